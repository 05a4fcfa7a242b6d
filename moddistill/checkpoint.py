"""Checkpoints of a run: trained parameters, optimizer, step and data position.

Frozen parameters are not among them; they are made again from what the config names.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moddistill.state import State
from moddistill.tree import Flat, check_same

KEEP = 2  # the newest one may have been cut off by a crash of the disk


@contextlib.contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.training.Checkpointer]:
    """The checkpoints in a folder; on leaving, waits for those still being written."""
    policy = ocp.training.preservation_policies.LatestN(KEEP)
    with ocp.training.Checkpointer(folder.resolve(), preservation_policy=policy) as checkpoints:
        yield checkpoints


def save(checkpoints: ocp.training.Checkpointer, state: State, position: Any) -> None:
    """Writes the state in the background. `position` is the iterator that records come from."""
    checkpoints.save_checkpointables_async(
        int(state.step), {"state": _saved(state), "data": position}, force=True
    )


def restore(checkpoints: ocp.training.Checkpointer, state: State, position: Any) -> State:
    """The newest saved state, with the frozen parameters of `state`; sets `position` back to it.

    Raises:
      ValueError: if the checkpoint is of another architecture, optimizer or trainable set, or of
        another number of processes, each of which has its own position.
    """
    step = checkpoints.latest.step
    _check_processes(Path(checkpoints.directory) / str(step))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state)
    )
    found = checkpoints.checkpointables_metadata(step).metadata["state"]
    origin = f"checkpoint {checkpoints.directory / str(step)}"
    check_same(_by_path(found), _by_path(abstract), origin)
    loaded = checkpoints.load_checkpointables(step, {"state": abstract, "data": position})
    return state.replace(**loaded["state"])


def _check_processes(folder: Path) -> None:
    names = (re.search(r"-of-(\d+)", file.name) for file in (folder / "data").iterdir())
    counts = {int(name[1]) for name in names if name}
    if counts - {jax.process_count()}:
        raise ValueError(
            f"checkpoint {folder} is of {max(counts)} processes, and now there are "
            f"{jax.process_count()}; accepted: as many as before"
        )


def _by_path(tree: Any) -> Flat:
    """Leaves by their path; Orbax reads dictionaries where the optimizer has named tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved(state: State) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
