"""Memory of compiled programs, on devices that are not there."""

import logging
from typing import Any

import jax

from moddistill.distributed import accelerators
from moddistill.errors import UserError

LOG = logging.getLogger("moddistill")
USABLE_MEMORY = 0.97  # fraction for programs; the runtime reserves the rest


def compile_program(lowered: Any, topology: str) -> Any:
    """Compiles a program for a topology; None if the compiler runs out of device memory."""
    try:
        return lowered.compile(compiler_options=accelerators.compiler_options(topology))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason or "vmem" in reason.lower():
            raise UserError(
                f"topology: expected settings that compile for {topology!r}, got an error of the "
                f"compiler: {reason}"
            ) from error
        LOG.warning("%s", reason)
        return None


def memory_per_chip(compiled: Any, topology: str) -> dict[str, int | None]:
    """Returns the compiler's bytes per chip; None values without a program."""
    memory = compiled.memory_analysis() if compiled else None
    if memory is None:
        return dict.fromkeys(f"{name}_bytes_per_chip" for name in ("peak", "argument", "temp"))
    cores = accelerators.devices_per_chip(topology)
    return {
        "peak_bytes_per_chip": cores * peak_bytes(memory, accelerators.parse_topology(topology)[0]),
        "argument_bytes_per_chip": cores * memory.argument_size_in_bytes,
        "temp_bytes_per_chip": cores * memory.temp_size_in_bytes,
    }


def peak_bytes(memory: Any, name: str) -> int:
    """Returns the peak bytes of one device from a program's `memory_analysis()`.

    Args:
      name: of the accelerator; "cpu" for CPUs.
    """
    if name != "cpu":  # the peak includes arguments in host memory
        return memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    sizes = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # CPUs have no peak of both
    return sizes + memory.output_size_in_bytes - memory.alias_size_in_bytes
