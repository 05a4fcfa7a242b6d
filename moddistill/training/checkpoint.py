"""Checkpoints of a run: trained parameters, optimizer, step and data position.

Frozen parameters are not saved: a resumed run loads them from the models that its config names.

A checkpoint is written under a hidden name, gets digests of all its files, and is then renamed to
its step. So one with a step as its name is complete; an interrupted one is never resumed from, and
of one that was damaged later, which its digests tell, a run goes back to the one before it. So it
does from one that was renamed, or is of another run.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from moddistill.distributed.processes import barrier, broadcast_from_main, is_main_process
from moddistill.errors import UserError, invalid
from moddistill.params import Flat, check_same
from moddistill.storage.digests import NAME, verify, write_digests
from moddistill.storage.text_file import remove, sync_folder, writing
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")

DAMAGED = ".damaged"  # after the step in the name of a checkpoint that cannot be resumed from


class Keep(NamedTuple):
    """Which checkpoints remain when a newer one is complete.

    Attributes:
      last: number of the newest ones, at least 1.
      every: those at multiples of it; 0 for none.
      scores: by step, of held-out records; the lowest remains, if there are any.
    """

    last: int = 2
    every: int = 0
    scores: Mapping[int, float] = MappingProxyType({})

    def steps(self, saved: Sequence[int]) -> set[int]:
        """Returns the steps that remain of those that are saved, in ascending order."""
        kept = set(saved[-self.last :])
        kept |= {step for step in saved if self.every and step % self.every == 0}
        scored = [step for step in saved if not math.isnan(self.scores.get(step, math.nan))]
        return kept | set(sorted(scored, key=lambda step: self.scores[step])[:1])


@dataclasses.dataclass
class Checkpoints:
    """The folder of a run's checkpoints, `directory/STEP/`.

    Attributes:
      run: id of the run.
      latest: the newest step, which the thread may still be writing; None before the first.
    """

    directory: Path
    run: str
    latest: int | None
    thread: ThreadPoolExecutor
    writing: Future[None] | None = None


@contextlib.contextmanager
def open_checkpoints(folder: Path, run: str) -> Iterator[Checkpoints]:
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
        checkpoints = Checkpoints(directory, run, None if latest < 0 else latest, thread)
        try:
            yield checkpoints
        finally:
            _wait(checkpoints)


def save(checkpoints: Checkpoints, state: State, next_row: int, keep: Keep) -> None:
    """Writes the state and the position in the data in the background.

    Raises:
      UserError: the disk is full, or was for the one before.
    """
    _wait(checkpoints)
    step = int(state.step)
    unfinished = checkpoints.directory / f".{step}.partial"
    # Returns once all arrays are copied to the host, so the next step may donate `state`; only the
    # write to disk is asynchronous.
    data = {"next_row": next_row, "step": step, "run": checkpoints.run}
    content = {"state": _saved(state), "data": data}
    with _writing(unfinished):
        response = ocp.save_checkpointables_async(unfinished, content)
    checkpoints.writing = checkpoints.thread.submit(_finish, response, unfinished, step, keep)
    checkpoints.latest = step


def _finish(response: Any, unfinished: Path, step: int, keep: Keep) -> None:
    """Names a checkpoint when all processes have written it, and removes those not to be kept."""
    with _writing(unfinished):
        response.result()
        if not is_main_process():
            return
        write_digests(unfinished, "train")
        unfinished.rename(unfinished.with_name(str(step)))
        sync_folder(unfinished.parent)  # before an older one is removed
    saved = _steps(unfinished.parent)
    for old in set(saved) - keep.steps(saved):
        folder = unfinished.with_name(str(old))
        if (folder / NAME).is_file():  # not a folder that someone else put there
            shutil.rmtree(folder)


@contextlib.contextmanager
def _writing(unfinished: Path) -> Iterator[None]:
    """Raises UserError if the disk is full, and after any error frees the space that was taken."""
    try:
        with writing(unfinished.parent):
            yield
    except BaseException:
        for part in unfinished.parent.glob(f"{unfinished.name}*"):
            shutil.rmtree(part, ignore_errors=True)
        raise


def _wait(checkpoints: Checkpoints) -> None:
    if checkpoints.writing is not None:
        checkpoints.writing.result()
        checkpoints.writing = None


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def restore(checkpoints: Checkpoints, state: State) -> tuple[State, int]:
    """The newest undamaged state, with the frozen parameters of `state`, and the next row of data.

    Newer ones that are damaged are logged and renamed, so that their steps can be saved again.

    Raises:
      UserError: all checkpoints are damaged, or the newest undamaged one is of another
        architecture, optimizer or trainable set.
    """
    folder = _newest_undamaged(checkpoints)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state)
    )
    # Shapes before arrays: of these, Orbax reports differences as errors of many kinds.
    found = ocp.metadata(folder).metadata  # of the `state`
    check_same(_by_path(found), _by_path(abstract), f"checkpoint {folder}")
    loaded = ocp.load_checkpointables(folder, {"state": abstract, "data": None})
    return state.replace(**loaded["state"]), int(loaded["data"]["next_row"])


def _newest_undamaged(checkpoints: Checkpoints) -> Path:
    """Returns the folder of the newest checkpoint whose files all match their digests."""
    directory, damaged, reasons = checkpoints.directory, [], []
    for step in reversed(_steps(directory)):
        folder = directory / str(step)
        try:
            verify(folder, expected="an undamaged checkpoint", shared=True)
            _check_identity(folder, checkpoints.run)
        except UserError as error:
            LOG.warning("%s; it is not resumed from", error)
            damaged.append(folder)
            reasons.append(error)
            continue
        barrier("finding a checkpoint")  # all have listed the folder
        if is_main_process():
            _set_aside(damaged)
        checkpoints.latest = step
        return folder
    raise UserError(
        f"{directory}: expected an undamaged checkpoint, or none to start from step 0, got damaged "
        f"ones of the steps {', '.join(folder.name for folder in damaged)}: {reasons[0]}"
    )


def _check_identity(folder: Path, run: str) -> None:
    """Raises UserError for a checkpoint of another step or another run."""
    data = ocp.load_checkpointables(folder, {"data": None})["data"]
    found = {name: data.get(name) for name in ("step", "run")}
    expected = {"step": int(folder.name), "run": run}
    if found != expected:
        raise invalid(str(folder), found, f"a checkpoint of {expected}")


def _set_aside(damaged: Sequence[Path]) -> None:
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}{DAMAGED}")
        remove(aside)  # of an earlier time
        folder.rename(aside)
        LOG.warning("%s is now named %s, and may be removed", folder, aside.name)


def _by_path(tree: Any) -> Flat:
    """Leaves by their path; Orbax reads dictionaries where the optimizer has named tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved(state: State) -> dict[str, Any]:
    names = ("step", "params", "opt_state", "mean_loss")
    return {name: getattr(state, name) for name in names}
