"""Several processes as one run: joining them, and who writes.

All processes see the same files. The first one writes what there is one of: configs, metrics, model
folders; checkpoints are written by all, each its shards.
"""

import hashlib
import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from moddistill.errors import UserError

_SILENCE = 60  # seconds after which a process counts as dead
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # how many they have started


def initialize(coordinator: str, count: int | None, index: int | None) -> None:
    """Makes this process one of several; must come before anything else that uses devices.

    Args:
      coordinator: empty for a process alone; `auto` under Slurm, Open MPI, on a TPU pod or GKE,
        which say the rest themselves; otherwise HOST:PORT of the first process.
      count: number of processes, with HOST:PORT alone.
      index: of this process, from 0; likewise.

    Raises:
      UserError: for HOST:PORT without the other two, for those without it, an index outside of
        the count, `auto` where nothing tells, or a process of several that is to be alone.
    """
    needed = coordinator not in ("", "auto")
    if needed and not re.fullmatch(r"[^:]+:\d+|\[.+\]:\d+", coordinator):
        raise UserError(f"--coordinator is {coordinator!r}; accepted: HOST:PORT, or auto")
    if (count is not None, index is not None) != (needed, needed):
        given = {"coordinator": coordinator or None, "processes": count, "process": index}
        said = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        raise UserError(
            f"flags are {said}; accepted: --coordinator HOST:PORT with both --processes and "
            "--process, --coordinator auto alone, or none of them"
        )
    if not coordinator:
        _check_alone()
        return
    if coordinator == "auto":
        _initialize_from_environment()
        return
    if not 0 <= index < count:
        raise UserError(
            f"--process is {index} of --processes {count}; accepted: 0 to one less than that"
        )
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=_SILENCE)


def _initialize_from_environment() -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE)
    except ValueError as error:
        raise UserError(
            f"--coordinator is 'auto', but nothing here tells of other processes ({error}); "
            "accepted: auto in a task of Slurm or Open MPI, on a TPU pod or GKE, else HOST:PORT"
        ) from None


def _check_alone() -> None:
    """Raises UserError in one of several tasks, which would all write the same run."""
    for name in _LAUNCHERS:
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"--coordinator is empty, but {name} is {os.environ[name]}; accepted: "
                "--coordinator auto, or one task"
            )


def check_equal_on_all_processes(what: str, text: str) -> None:
    """Raises UserError unless all processes bring the same text; all must call it."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(digest)
    different = [i for i, other in enumerate(found) if np.any(other != found[0])]
    if different:
        raise UserError(
            f"{what} of process {different[0]} are not those of process 0; accepted: the same "
            "command in every process"
        )


def any_process(flags: np.ndarray) -> np.ndarray:
    """Elementwise `or` of every process's boolean array; all must call it."""
    if jax.process_count() == 1:
        return flags
    return multihost_utils.process_allgather(flags).any(axis=0)


def broadcast_from_main(number: int) -> int:
    """The first process's number, in every process; all must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_main_process() -> bool:
    """Whether this process writes what there is one of."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Returns when every process has come here; `what` is for the message if one does not."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
