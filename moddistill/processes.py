"""Several processes as one run: joining them, and who writes.

All processes see the same files. The first one writes what there is one of: configs, metrics, model
folders; checkpoints are written by all, each its shards.
"""

import jax
from jax.experimental import multihost_utils

_SILENCE = 60  # seconds after which a process counts as dead


def join(coordinator: str, count: int, index: int) -> None:
    """Makes this process one of several; must come before anything else that uses devices.

    Args:
      coordinator: empty for a process alone; `auto` under Slurm, Open MPI, on a TPU pod or GKE,
        which say the rest themselves; otherwise HOST:PORT of the first process.
      count: number of processes.
      index: of this process, from 0.

    Raises:
      ValueError: for a coordinator without the other two, or an index outside of the count.
    """
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
