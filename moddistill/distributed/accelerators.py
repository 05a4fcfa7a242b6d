"""Specifications of accelerators, and topologies to compile for without hardware.

A topology is a name and sizes: `v5p:2x2x1` is a TPU generation and its chips along each dimension
of the torus, `h100:8` 8 GPUs of one machine, `h100:4x8` those of 4 machines, `cpu:8` simulated
devices.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from moddistill.errors import UserError, invalid, not_one_of

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published specification of one chip: Google Cloud's page of a TPU, NVIDIA's data sheet.

    Attributes:
      kind: prefix of JAX's `device_kind`.
      memory: bytes.
      bandwidth: bytes per second of this memory.
      flops: dense bfloat16 FLOP/s.
      devices: JAX devices per chip.
    """

    kind: str
    memory: int
    bandwidth: float
    flops: float
    devices: int = 1


CHIPS = {
    "v4": Chip(kind="TPU v4", memory=32 * GIB, bandwidth=1.2e12, flops=275e12),
    "v5e": Chip(kind="TPU v5 lite", memory=16 * GIB, bandwidth=0.819e12, flops=197e12),
    "v5p": Chip(kind="TPU v5", memory=95 * GIB, bandwidth=2.765e12, flops=459e12),
    "v6e": Chip(kind="TPU v6 lite", memory=32 * GIB, bandwidth=1.638e12, flops=918e12),
    "tpu7x": Chip(kind="TPU7x", memory=192 * GIB, bandwidth=7.38e12, flops=2307e12, devices=2),
    "a100": Chip(kind="NVIDIA A100", memory=80 * GIB, bandwidth=2.039e12, flops=312e12),
    "h100": Chip(kind="NVIDIA H100", memory=80 * GIB, bandwidth=3.35e12, flops=989e12),
    "h200": Chip(kind="NVIDIA H200", memory=141 * 10**9, bandwidth=4.8e12, flops=989e12),
    "b200": Chip(kind="NVIDIA B200", memory=180 * 10**9, bandwidth=8.0e12, flops=2250e12),
}

# Dimensions of the torus of a TPU generation.
_TORUS_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Specification of a GPU for XLA's compiler.

    Attributes:
      capability: CUDA compute capability, major and minor.
      cores: streaming multiprocessors.
      shared_per_core: bytes of shared memory per multiprocessor.
      cache: bytes of L2 cache.
      clock_ghz: boost clock.
    """

    capability: tuple[int, int]
    cores: int
    shared_per_core: int
    cache: int
    clock_ghz: float


GPUS = {
    "a100": Gpu(
        capability=(8, 0),
        cores=108,
        shared_per_core=164 * KIB,
        cache=40 * MIB,
        clock_ghz=1.41,
    ),
    "h100": Gpu(
        capability=(9, 0),
        cores=132,
        shared_per_core=228 * KIB,
        cache=50 * MIB,
        clock_ghz=1.98,
    ),
    "h200": Gpu(
        capability=(9, 0),
        cores=132,
        shared_per_core=228 * KIB,
        cache=50 * MIB,
        clock_ghz=1.98,
    ),
    "b200": Gpu(
        capability=(10, 0),
        cores=148,
        shared_per_core=228 * KIB,
        cache=126 * MIB,
        clock_ghz=1.97,
    ),
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns the bfloat16 FLOP/s of all devices together; None for an unknown device kind."""
    chips = [chip for chip in CHIPS.values() if devices[0].device_kind.startswith(chip.kind)]
    if not chips:
        return None
    # The longest prefix: "TPU v5" is also a prefix of "TPU v5 lite".
    chip = max(chips, key=lambda chip: len(chip.kind))
    return len(devices) * chip.flops / chip.devices


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """Returns name and sizes of `NAME:AxBxC`; UserError for an unknown name or another form."""
    name, _, sizes = topology.partition(":")
    accelerators = (*CHIPS, "cpu")
    if name not in accelerators:
        raise not_one_of(f"accelerator of topology {topology!r}", name, accelerators)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise invalid("topology", topology, "a name and sizes, as v5e:4x4, v5p:2x2x1 or h100:8")
    counts = tuple(int(size) for size in sizes.split("x"))
    dimensions = _TORUS_DIMENSIONS.get(name, len(counts))
    if len(counts) != dimensions:
        example = f"{name}:{'x'.join('2' * dimensions)}"
        raise invalid("topology", topology, f"{dimensions} sizes, as {example}")
    return name, counts


def one_chip(name: str) -> str:
    """Returns the topology of a single chip of that name, such as `v5e:1x1`."""
    return f"{name}:{'x'.join('1' * _TORUS_DIMENSIONS.get(name, 1))}"


def topology_devices(topology: str) -> list[Any]:
    """Returns devices to compile for; only those of `cpu` can run a program.

    Raises:
      UserError: the accelerator's compiler is not installed or does not know the topology.
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
            f"topology: expected one that the compiler of the extra `{extra}` knows (pip install "
            f"'moddistill[{extra}]'; it needs no device), got {topology!r} ({reason})"
        ) from None


def compiler_options(topology: str) -> dict[str, Any]:
    """Returns XLA options for compiling without the device, which rules out autotuning.

    Untuned Triton matmuls keep default tile sizes, which do not compile for some shapes.
    """
    name, _ = parse_topology(topology)
    return {"xla_gpu_enable_triton_gemm": False} if name in GPUS else {}


def _tpu_options(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    # libtpu would query the metadata server of the cloud for these.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip, so no lock on it
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-{math.prod(sizes)}")
    options = {"platform": "tpu", "topology_name": f"{name}:{'x'.join(map(str, sizes))}"}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    return options


def _gpu_options(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Returns topology options for machines x GPUs, with a target description of the GPU."""
    *machines, gpus = sizes
    gpu, chip = GPUS[name], CHIPS[name]
    major, minor = gpu.capability
    # XLA's `GpuTargetConfigProto` as text; constants are common to all of `GPUS`.
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
  memory_bandwidth: {round(chip.bandwidth)}
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
    """Returns the number of JAX devices per chip."""
    name, _ = parse_topology(topology)
    return CHIPS[name].devices if name in CHIPS else 1


def _host_devices(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        expected = f"at most {len(devices)} devices (JAX_NUM_CPU_DEVICES sets their number)"
        raise invalid("topology", f"cpu:{count}", expected)
    return devices[:count]
