"""Several processes as one run: joining them, and who writes.

All processes see the same files. The first one writes what there is one of: configs, metrics, model
folders; checkpoints are written by all, each its shards.
"""

import jax
from jax.experimental import multihost_utils

_SILENCE = 60  # seconds after which a process counts as dead


def join(coordinator: str, count: int | None, index: int | None) -> None:
    """Makes this process one of several; must come before anything else that uses devices.

    Args:
      coordinator: empty for a process alone; `auto` under Slurm, Open MPI, on a TPU pod or GKE,
        which say the rest themselves; otherwise HOST:PORT of the first process.
      count: number of processes, with HOST:PORT alone.
      index: of this process, from 0; likewise.

    Raises:
      ValueError: for HOST:PORT without the other two, for those without it, or an index outside of
        the count.
    """
    needed = coordinator not in ("", "auto")
    if (count is not None, index is not None) != (needed, needed):
        given = {"coordinator": coordinator or None, "processes": count, "process": index}
        said = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"flags are {said}; accepted: --coordinator HOST:PORT with both --processes and "
            "--process, --coordinator auto alone, or none of them"
        )
    if not coordinator:
        return
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE)
        return
    if not 0 <= index < count:
        raise ValueError(
            f"--process is {index} of --processes {count}; accepted: 0 to one less than that"
        )
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=_SILENCE)


def is_first() -> bool:
    """Whether this process writes what there is one of."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` is for the message if one does not."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
