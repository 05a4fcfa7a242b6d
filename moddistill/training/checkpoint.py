"""Checkpoints of a run: trained parameters, optimizer, step and data position.

Frozen parameters are not saved: a resumed run loads them from the models that its config names.

A checkpoint is written under a hidden name, gets digests of all its files, and is then renamed to
its step. So one with a step as its name is complete; an interrupted one is never resumed from.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moddistill.distributed.processes import broadcast_from_main, is_main_process
from moddistill.params import Flat, check_same
from moddistill.storage.digests import NAME, verify, write_digests
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")

KEEP = 2  # the previous one too, in case the newest is damaged on disk


@dataclasses.dataclass
class Checkpoints:
    """The folder of a run's checkpoints, `directory/STEP/`.

    `latest` is the newest step, which the thread may still be writing; None before the first.
    """

    directory: Path
    latest: int | None
    thread: ThreadPoolExecutor
    writing: Future[None] | None = None


@contextlib.contextmanager
def open_checkpoints(folder: Path) -> Iterator[Checkpoints]:
    """The checkpoints in a folder; on leaving, waits for the one still being written.

    All processes call this, and agree on the newest step. Unfinished checkpoints are removed.
    """
    directory = folder.resolve()
    # The broadcast carries an int32, in which -1 means no checkpoint.
    latest = -1
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob(".*.partial*"):
            LOG.warning("checkpoint %s was not finished and is removed", unfinished)
            shutil.rmtree(unfinished)
        latest = max(_steps(directory), default=-1)
    latest = broadcast_from_main(latest)
    with ThreadPoolExecutor(1) as thread:
        checkpoints = Checkpoints(directory, None if latest < 0 else latest, thread)
        try:
            yield checkpoints
        finally:
            _wait(checkpoints)


def save(checkpoints: Checkpoints, state: State, next_row: int) -> None:
    """Writes the state and the position in the data in the background."""
    _wait(checkpoints)
    step = int(state.step)
    unfinished = checkpoints.directory / f".{step}.partial"
    # Returns once all arrays are copied to the host, so the next step may donate `state`; only the
    # write to disk is asynchronous.
    content = {"state": _saved(state), "data": {"next_row": next_row}}
    response = ocp.save_checkpointables_async(unfinished, content)
    checkpoints.writing = checkpoints.thread.submit(_finish, response, unfinished, step)
    checkpoints.latest = step


def _finish(response: Any, unfinished: Path, step: int) -> None:
    """Names a checkpoint when all processes have written it, and removes the oldest."""
    response.result()
    if not is_main_process():
        return
    write_digests(unfinished, "train")
    unfinished.rename(unfinished.with_name(str(step)))
    for old in _steps(unfinished.parent)[:-KEEP]:
        folder = unfinished.with_name(str(old))
        if (folder / NAME).is_file():  # not a folder that someone else put there
            shutil.rmtree(folder)


def _wait(checkpoints: Checkpoints) -> None:
    if checkpoints.writing is not None:
        checkpoints.writing.result()
        checkpoints.writing = None


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def restore(checkpoints: Checkpoints, state: State) -> tuple[State, int]:
    """The newest saved state, with the frozen parameters of `state`, and the next row of data.

    Raises:
      UserError: if a file of the checkpoint is damaged, or if it is of another architecture,
        optimizer or trainable set.
    """
    # Order: bytes, shapes, then arrays. Orbax reports damage as errors of many kinds, so all that
    # can be wrong is found before it loads.
    folder = checkpoints.directory / str(checkpoints.latest)
    verify(folder, expected=_way_out(folder), shared=True)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state)
    )
    found = ocp.metadata(folder).metadata  # of the `state`
    check_same(_by_path(found), _by_path(abstract), f"checkpoint {folder}")
    loaded = ocp.load_checkpointables(folder, {"state": abstract, "data": {"next_row": 0}})
    return state.replace(**loaded["state"]), int(loaded["data"]["next_row"])


def _way_out(folder: Path) -> str:
    """Returns the expectation in the error for a damaged checkpoint."""
    before = [step for step in _steps(folder.parent) if step < int(folder.name)]
    start = f"resume from step {before[-1]}" if before else "start from step 0"
    return f"an undamaged copy, or to remove this folder and {start}"


def _by_path(tree: Any) -> Flat:
    """Leaves by their path; Orbax reads dictionaries where the optimizer has named tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved(state: State) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
