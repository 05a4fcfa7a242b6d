"""The folder of a run: `config.json`, and which settings may change when the run resumes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moddistill.config import TrainConfig
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, invalid
from moddistill.storage.digests import NAME, check_outside
from moddistill.storage.json_file import changed_values, write_json
from moddistill.training.streams import LISTS

# Settings that may change when a run resumes: of memory, speed and logging, and its length.
_FREE = (
    "steps", "epochs", "grad_accum_steps", "remat", "scan", "donate", "teacher_offload",
    "logits_chunk_size", "expert_transport", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor",
    "data.workers", "data.worker_timeout", "data.index", "data.max_rejected", "log_every",
    "save_every", "keep_last", "keep_every", "keep_best", "heldout_every", "tasks",
    "eval_every", "on_divergence",
    "divergence_factor", "max_skipped", "profile_steps",
)  # fmt: skip

_MOST_SHOWN = 5  # changed settings in an error

# Side effects of changing a setting, for the log.
_EFFECTS = {
    "steps": "warm-up and decay are those of the new number from here on",
    "epochs": "warm-up and decay are those of the new number of steps from here on",
    "grad_accum_steps": "the balance loss of experts, their capacity and kto_pair's KL are per "
    "micro-batch, so that losses differ slightly from here on",
}


def check_is_workdir(workdir: Path) -> None:
    """Raises UserError for a folder with files that a run would overwrite, but did not write."""
    file = workdir / "config.json"
    check_outside(file, "--workdir")
    if workdir.exists() and not workdir.is_dir():
        raise invalid("--workdir", str(workdir), "a folder")
    if file.is_file():
        try:
            settings = json.loads(file.read_text())
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict) or "stage" not in settings:
            expected = "a new folder, or that of a run with its settings in config.json"
            raise invalid("--workdir", str(workdir), expected)
        return
    for name in ("metrics.jsonl", *LISTS, "checkpoints"):
        if (workdir / name).exists():
            expected = f"a new folder, or that of a run, not one with {name} but no config.json"
            raise invalid("--workdir", str(workdir), expected)


def check_workdir(config: TrainConfig, workdir: Path) -> list[str]:
    """Checks that the run in a workdir can be resumed with this config.

    A run that has not written a checkpoint yet has nothing to resume, and any setting may change.

    Returns:
      A line for each setting that changes, for the log.

    Raises:
      UserError: if a setting has changed that would make another result.
    """
    file, last = workdir / "config.json", last_step(workdir)
    finished = (workdir / "model").exists()
    if not file.is_file() or (last is None and not finished):
        return []
    changed = _changed(config, file)
    fixed = [
        f"{name} {now!r} instead of {then!r}"
        for name, (then, now) in changed.items()
        if name not in _FREE and name.split(".")[0] not in _FREE
    ]
    more = f" and {len(fixed) - _MOST_SHOWN} more" if len(fixed) > _MOST_SHOWN else ""
    if fixed:
        raise UserError(
            f"--workdir: expected the settings that the run in {workdir} began with, of which "
            f"{', '.join(_FREE)} may change, got {'; '.join(fixed[:_MOST_SHOWN])}{more}"
        )
    if last is None and "steps" in changed:
        made = changed["steps"][0]
        expected = f"{made}, since the run in {workdir} is finished and has no checkpoint"
        raise invalid("config.steps", config.steps, expected)
    return [
        f"config.{name}: {then!r} before, {now!r} now"
        + (f"; {_EFFECTS[name]}" if name in _EFFECTS else "")
        for name, (then, now) in changed.items()
    ]


def check_steps(config: TrainConfig, workdir: Path) -> None:
    """Raises UserError for fewer steps than the run in a workdir has made."""
    # Folders without digests are found to be damaged when they are read.
    last = max((step for step in _steps(workdir, f"*/{NAME}")), default=0)
    if config.steps < last:
        expected = f">= {last}, the steps that the run in {workdir} has made"
        raise invalid("config.steps", config.steps, expected)


def is_finished(config: TrainConfig, source: dict[str, Any]) -> bool:
    """Returns whether the settings that a model was made with are those of a run's length."""
    return all(source.get(name) == getattr(config, name) for name in ("steps", "epochs"))


def last_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint in a workdir, if there is one."""
    return max(_steps(workdir, "*"), default=None)


def _steps(workdir: Path, pattern: str) -> list[int]:
    folder = workdir / "checkpoints"
    names = (path.relative_to(folder).parts[0] for path in folder.glob(pattern))
    return [int(name) for name in names if name.isdecimal()]


def _changed(config: TrainConfig, file: Path) -> dict[str, tuple[Any, Any]]:
    """Settings by their dotted names, with the value in `config.json` and the one in `config`."""
    return changed_values(json.loads(file.read_text()), dataclasses.asdict(config))


def write_settings(config: TrainConfig, workdir: Path) -> None:
    """Writes `config.json`, against which later runs in the workdir are checked."""
    if not is_main_process():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", dataclasses.asdict(config))
