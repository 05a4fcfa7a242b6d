"""Multi-process runs: initialisation, barriers and small collectives on the host.

All processes share a file system. The main process writes configs, metrics and model folders; all
processes write checkpoints, each its own shards.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from moddistill.errors import UserError, invalid

_HEARTBEAT_TIMEOUT = 60  # seconds; then all processes exit
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set by launchers


def initialize(coordinator: str, count: int | None, index: int | None) -> None:
    """Initialises this process as one of several; must precede all use of devices.

    Args:
      coordinator: empty for a single process; `auto` under Slurm, Open MPI, on a TPU pod or GKE,
        where JAX detects the rest; otherwise HOST:PORT of process 0.
      count: number of processes; only with HOST:PORT.
      index: index of this process, from 0; only with HOST:PORT.

    Raises:
      UserError: the flags are incomplete or contradict each other, `auto` detects nothing, or a
        launcher started several tasks and `coordinator` is empty.
    """
    is_explicit = coordinator not in ("", "auto")
    if is_explicit and not re.fullmatch(r"[^:]+:\d+|\[.+\]:\d+", coordinator):
        raise invalid("--coordinator", coordinator, "HOST:PORT or auto")
    if (count is not None, index is not None) != (is_explicit, is_explicit):
        flags = {"coordinator": coordinator or None, "processes": count, "process": index}
        text = " ".join(f"--{name} {value}" for name, value in flags.items() if value is not None)
        raise UserError(
            "flags: expected --coordinator HOST:PORT with both --processes and --process, only "
            f"--coordinator auto, or none of them, got {text}"
        )
    if not coordinator:
        _check_single_task()
        return
    if coordinator == "auto":
        _initialize_from_environment()
        return
    if not 0 <= index < count:
        raise invalid("--process", index, f"0 to {count - 1} with --processes {count}")
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT
    )


def _initialize_from_environment() -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT)
    except ValueError as error:
        raise UserError(
            "--coordinator: expected HOST:PORT, or auto in a task of Slurm or Open MPI, on a TPU "
            f"pod or GKE, got 'auto', which detects no other processes ({error})"
        ) from None


def _check_single_task() -> None:
    """Raises UserError in one of several tasks, since each would write the same run."""
    for name in _TASK_COUNTS:
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"--coordinator: expected auto with {name}={os.environ[name]}, or one task, got "
                "no coordinator"
            )


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends a process of several at once after an error.

    At its exit JAX would wait for the others, for minutes, and these for its part of a collective.
    """
    try:
        yield
    except SystemExit as error:
        # After a signal all processes end together.
        if isinstance(error.code, str) and jax.distributed.is_initialized():
            print(error.code, file=sys.stderr, flush=True)
            os._exit(1)
        raise


def check_equal_on_all_processes(name: str, text: str) -> None:
    """Raises UserError unless `text` is equal on all processes. Collective: all must call it.

    Args:
      name: plural noun for `text`, for the message.
    """
    if jax.process_count() == 1:
        return
    # A digest, since the collective needs arrays of equal shapes, and texts may differ in length.
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = [i for i, other in enumerate(digests) if np.any(other != digests[0])]
    if different:
        raise UserError(
            f"{name}: expected the same command in every process, got other {name} in process "
            f"{different[0]} than in process 0"
        )


def any_process(flags: np.ndarray) -> np.ndarray:
    """Returns the elementwise `or` over all processes of a boolean array. Collective."""
    if jax.process_count() == 1:
        return flags
    return multihost_utils.process_allgather(flags).any(axis=0)


def broadcast_from_main(number: int) -> int:
    """Returns the `number` (int32) of the main process on every process. Collective."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_main_process() -> bool:
    """Returns True in the process that writes shared files, process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process calls it with the same `name`; others are an error."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
