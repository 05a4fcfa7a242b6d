"""Accelerators by name, for compiling without owning one.

A topology is `v5p:2x2x1`: a TPU generation and its chips in each direction; `h100:8` is as many
GPUs of one machine, `h100:4x8` those of four; `cpu:8` simulated devices of this one.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from moddistill.errors import UserError, nearest

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory in bytes and dense bfloat16 operations a second of one chip, as its maker states them.

    `kind` is how the name begins that the backend gives its devices.
    """

    kind: str
    memory: int
    flops: float
    devices: int = 1  # that the compiler sees


CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 275e12),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 197e12),
    "v5p": Chip("TPU v5", 95 * GIB, 459e12),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 918e12),
    "tpu7x": Chip("TPU7x", 192 * GIB, 2307e12, devices=2),
    "a100": Chip("NVIDIA A100", 80 * GIB, 312e12),
    "h100": Chip("NVIDIA H100", 80 * GIB, 989e12),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 989e12),
    "b200": Chip("NVIDIA B200", 180 * 10**9, 2250e12),
}

# In which the chips of a TPU lie.
_DIRECTIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler asks a GPU for: processors, caches and memory in bytes, bytes a second."""

    capability: tuple[int, int]
    cores: int
    shared_per_core: int
    cache: int
    bandwidth: float
    clock_ghz: float


GPUS = {
    "a100": Gpu((8, 0), 108, 164 * KIB, 40 * MIB, 2.039e12, 1.41),
    "h100": Gpu((9, 0), 132, 228 * KIB, 50 * MIB, 3.35e12, 1.98),
    "h200": Gpu((9, 0), 132, 228 * KIB, 50 * MIB, 4.8e12, 1.98),
    "b200": Gpu((10, 0), 148, 228 * KIB, 126 * MIB, 8.0e12, 1.97),
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Operations a second of all these devices together; None if their speed is not known."""
    chips = [chip for chip in CHIPS.values() if devices[0].device_kind.startswith(chip.kind)]
    if not chips:
        return None
    chip = max(chips, key=lambda chip: len(chip.kind))
    return len(devices) * chip.flops / chip.devices


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """Name and sizes of `NAME:AxBxC`; UserError for a name or form that is not known."""
    name, _, sizes = topology.partition(":")
    known = (*CHIPS, "cpu")
    if name not in known:
        raise UserError(
            f"topology {topology!r} is of an unknown accelerator; accepted: {', '.join(known)}"
            + nearest(name, known)
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(
            f"topology {topology!r} states no sizes; accepted: such as v5e:4x4, v5p:2x2x1, h100:8 "
            "or cpu:8"
        )
    counts = tuple(int(size) for size in sizes.split("x"))
    directions = _DIRECTIONS.get(name, len(counts))
    if len(counts) != directions:
        raise UserError(
            f"topology {topology!r} has {len(counts)} sizes; accepted: {directions}, as chips of "
            f"{name} lie in so many directions, such as {name}:{'x'.join('2' * directions)}"
        )
    return name, counts


def topology_devices(topology: str) -> list[Any]:
    """Devices to compile for; they cannot run anything unless they are this machine's own.

    Raises:
      UserError: without that accelerator's compiler, or for a topology that it does not know.
    """
    name, sizes = parse_topology(topology)
    if name == "cpu":
        return _host_devices(math.prod(sizes))
    options = (_gpu_options if name in GPUS else _tpu_options)(name, sizes)
    extra = "cuda12" if name in GPUS else "tpu"
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {topology!r} cannot be compiled for here ({reason}); accepted: a topology "
            f"of that accelerator, with the extra `{extra}` installed (pip install "
            f"'moddistill[{extra}]'), which needs no such device"
        ) from None


def compiler_options(topology: str) -> dict[str, Any]:
    """What the compiler is told where it cannot try things out.

    Without a GPU, Triton's products keep their first tiles, which some shapes refuse.
    """
    name, _ = parse_topology(topology)
    return {"xla_gpu_enable_triton_gemm": False} if name in GPUS else {}


def _tpu_options(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    # What the compiler would otherwise ask a cloud for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip, so plans need not queue
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-{math.prod(sizes)}")
    options = {"platform": "tpu", "topology_name": f"{name}:{'x'.join(map(str, sizes))}"}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    return options


def _gpu_options(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Machines times GPUs of each; a description of the GPU stands for the GPU."""
    *machines, gpus = sizes
    gpu, chip = GPUS[name], CHIPS[name]
    major, minor = gpu.capability
    # XLA's `GpuTargetConfigProto` as text; what all these GPUs have in common is stated as it is.
    target = f"""
platform_name: "CUDA"
device_description_str: "{chip.kind}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {64 if major == 8 else 128}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory}
  memory_bandwidth: {round(gpu.bandwidth)}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared_per_core}
  shared_memory_per_block_optin: {gpu.shared_per_core - KIB}
  shared_memory_per_block: {48 * KIB}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_core_limit: {64 * KIB}
  registers_per_block_limit: {64 * KIB}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
}}
"""
    return {
        "platform": "cuda",
        "topology_name": name,
        "topology": f"1x{math.prod(machines)}x{gpus}",
        "target_config": target,
    }


def devices_per_chip(topology: str) -> int:
    """How many devices the compiler sees in one chip."""
    name, _ = parse_topology(topology)
    return CHIPS[name].devices if name in CHIPS else 1


def _host_devices(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"topology 'cpu:{count}' needs {count} devices, there are {len(devices)}; accepted: no "
            "more than these (JAX_NUM_CPU_DEVICES sets their number)"
        )
    return devices[:count]
