"""Accelerators by name, for compiling without owning one.

A topology is `v5p:2x2x1`: a TPU generation and its chips in each direction; `cpu:8` is as many
simulated devices of this machine.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from moddistill.config import nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory in bytes and bfloat16 operations a second of one chip, as Google publishes them."""

    memory: int
    flops: float
    devices: int = 1  # that the compiler sees


CHIPS = {
    "v4": Chip(32 * GIB, 275e12),
    "v5e": Chip(16 * GIB, 197e12),
    "v5p": Chip(95 * GIB, 459e12),
    "v6e": Chip(32 * GIB, 918e12),
    "tpu7x": Chip(192 * GIB, 2307e12, devices=2),
}


# As the backends name them; bfloat16 operations a second, dense.
_SPEED = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Operations a second of all these devices together; None if their speed is not known."""
    names = [name for name in _SPEED if devices[0].device_kind.startswith(name)]
    return len(devices) * _SPEED[max(names, key=len)] if names else None


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """Name and sizes of `NAME:AxBxC`; ValueError for a name or form that is not known."""
    name, _, sizes = topology.partition(":")
    known = (*CHIPS, "cpu")
    if name not in known:
        raise ValueError(
            f"topology {topology!r} is of an unknown accelerator; accepted: {', '.join(known)}"
            + nearest(name, known)
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"topology {topology!r} states no sizes; accepted: such as v5e:4x4, v5p:2x2x1 or cpu:8"
        )
    return name, tuple(int(size) for size in sizes.split("x"))


def devices_of(topology: str) -> list[Any]:
    """Devices to compile for; they cannot run anything unless they are this machine's own.

    Raises:
      ValueError: without the TPU compiler, or for a topology that it does not know.
    """
    name, sizes = parse(topology)
    if name == "cpu":
        return _host_devices(math.prod(sizes))
    # What the compiler would otherwise ask a cloud for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-{math.prod(sizes)}")
    one = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology!r} cannot be compiled for here ({reason}); accepted: a topology "
            "of that generation, with the extra `tpu` installed (pip install 'moddistill[tpu]')"
        ) from None
    return list(found.devices)


def _host_devices(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"topology 'cpu:{count}' needs {count} devices, there are {len(devices)}; accepted: no "
            "more than these (JAX_NUM_CPU_DEVICES sets their number)"
        )
    return devices[:count]
