"""What the settings of a run may be, alone and together with a mesh or a workdir."""

import dataclasses
import json
import operator
from collections import Counter
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moddistill.config import ExpertConfig, TrainConfig, UpcycleConfig
from moddistill.configdict import check_values
from moddistill.distributed.processes import is_main_process
from moddistill.distributed.sharding import BATCH_AXES, num_batch_shards
from moddistill.errors import UserError, invalid
from moddistill.params import flatten
from moddistill.storage.digests import check_outside
from moddistill.training.stages import STAGES, stage_of

# Settings that a run may change when it resumes: of memory, speed and reports, and its length.
_FREE = (
    "steps", "accumulate", "remat", "scan", "donate", "teacher_memory", "logits_chunk_size",
    "expert_transport", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor", "data.workers",
    "log_every", "save_every", "profile_steps",
)  # fmt: skip

# Side effects of changing a setting, for the log.
_EFFECTS = {
    "steps": "warm-up and decay are those of the new number from here on",
    "accumulate": "the balance loss of experts, their capacity and kto_pair's KL are per "
    "micro-batch, so that losses differ slightly from here on",
}


def check_settings(config: TrainConfig) -> None:
    """Raises UserError for an unknown stage, numbers without a meaning, or settings not used."""
    check_values(config)
    stage = stage_of(config)
    for name, default in (("moe", ExpertConfig()), ("upcycle", UpcycleConfig())):
        if not stage.sparse and getattr(config, name) != default:
            raise UserError(
                f"config.{name} is set, but stage {config.stage!r} makes no experts; accepted: its "
                "defaults, since the student brings its own"
            )
    if bool(config.heldout_steps) != bool(config.data.heldout.path):
        raise UserError(
            f"config.data.heldout.path is {config.data.heldout.path!r} and heldout_steps is "
            f"{config.heldout_steps}; accepted: both, or neither"
        )
    _check_read(config)
    _check_losses(config)
    profiled = config.profile_steps
    if profiled and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1] <= config.steps):
        raise UserError(
            f"config.profile_steps is {profiled}; accepted: first and last step, such as (10, 12), "
            f"of 1 to {config.steps}, or ()"
        )
    if not config.teacher and (config.teacher_weights, config.teacher_memory) != (
        "dtype",
        "device",
    ):
        raise UserError(
            "config.teacher_weights or teacher_memory is set, but config.teacher is empty; "
            "accepted: their defaults"
        )
    if config.batch_size % config.accumulate:
        raise UserError(
            f"config.batch_size is {config.batch_size}; accepted: a multiple of accumulate, "
            f"{config.accumulate}"
        )


def _check_read(config: TrainConfig) -> None:
    """Raises UserError for settings of losses that the stage does not have."""
    settings = dict.fromkeys(name for row in STAGES.values() for name in row.reads)
    for name in (name for name in settings if name not in STAGES[config.stage].reads):
        value, default = (operator.attrgetter(name)(c) for c in (config, TrainConfig()))
        if value != default:
            readers = ", ".join(stage for stage, row in STAGES.items() if name in row.reads)
            raise invalid(
                f"config.{name}",
                value,
                f"{default!r} in stage {config.stage!r} (the default; read by {readers} only)",
            )


def _check_losses(config: TrainConfig) -> None:
    """Raises UserError for settings of losses and experts that the chosen variant never reads."""
    distillation, preference, moe = config.distillation, config.preference, config.moe
    unread = (
        (
            preference.label_smoothing and preference.kind != "sigmoid",
            "preference.label_smoothing",
            "preference.kind=sigmoid",
        ),
        (
            distillation.kd_shift != "correct" and distillation.kd_positions != "response",
            "distillation.kd_shift",
            "distillation.kd_positions=response",
        ),
        (
            moe.capacity_factor != ExpertConfig().capacity_factor and moe.dispatch != "capacity",
            "moe.capacity_factor",
            "moe.dispatch=capacity",
        ),
    )
    for wrong, name, reader in unread:
        if wrong:
            value = operator.attrgetter(name)(config)
            raise UserError(f"config.{name} is {value!r}, which only {reader} reads")


def check_spread(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless the samples and positions can be spread over the devices."""
    _check_processes(mesh)
    places = num_batch_shards(mesh)
    if (config.batch_size // config.accumulate) % places:
        raise UserError(
            f"config.batch_size is {config.batch_size} in {config.accumulate} micro-batches; "
            f"accepted: micro-batches of a multiple of {places} samples, for the mesh has so many "
            f"devices along {', '.join(BATCH_AXES)}"
        )
    if config.data.max_length % mesh.shape["tensor"]:
        raise UserError(
            f"config.data.max_length is {config.data.max_length}; accepted: a multiple of "
            f"mesh.tensor, {mesh.shape['tensor']}, along which positions meet the vocabulary"
        )


def _check_processes(mesh: Mesh) -> None:
    """Raises UserError unless each process alone has its samples, as many as the others.

    Each reads its own; of two that shared a place, each would put another sample there. Together
    with whole places for each micro-batch, this spreads `batch_size` evenly over processes too.
    """
    tensor = mesh.shape["tensor"]
    places = mesh.devices.reshape(-1, tensor)  # `tensor` is the last axis
    owners = [{device.process_index for device in place} for place in places]
    if max(map(len, owners)) > 1:
        raise UserError(
            f"config.mesh.tensor is {tensor}, along which lie devices of several processes; "
            "accepted: a size, such as 1, with all devices of a sample in one process"
        )
    held = Counter(owner for [owner] in owners)
    if len(set(held.values())) > 1:
        raise UserError(
            f"config.mesh: processes have {min(held.values())} to {max(held.values())} places of "
            "samples on the mesh; accepted: as many in each"
        )


def check_is_workdir(workdir: Path) -> None:
    """Raises UserError for a folder with files that a run would overwrite, but did not write."""
    file = workdir / "config.json"
    accepted = "accepted: a new --workdir, or that of a run"
    check_outside(file, "--workdir")
    if file.is_file():
        try:
            settings = json.loads(file.read_text())
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict) or "stage" not in settings:
            raise UserError(f"--workdir: {file} does not hold the settings of a run; {accepted}")
        return
    for name in ("metrics.jsonl", "quarantine.jsonl", "cut.jsonl", "checkpoints"):
        if (workdir / name).exists():
            raise UserError(f"--workdir: {workdir} has {name}, but no config.json; {accepted}")


def check_workdir(config: TrainConfig, workdir: Path) -> list[str]:
    """Checks that the run in a workdir can be resumed with this config.

    A run that has not written a checkpoint yet has nothing to resume, and any setting may change.

    Returns:
      A line for each setting that changes, for the log.

    Raises:
      UserError: if a setting has changed that would make another result, or `steps` are fewer than
        the run has made.
    """
    file, last = workdir / "config.json", last_step(workdir)
    finished = (workdir / "model").exists()
    if not file.is_file() or (last is None and not finished):
        return []
    changed = _changed(config, file)
    fixed = [
        f"{name}: {then!r} there, {now!r} now"
        for name, (then, now) in changed.items()
        if name not in _FREE
    ]
    if fixed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(fixed)}); accepted: the same "
            f"settings to resume it, of which {', '.join(_FREE)} may change, or another --workdir"
        )
    if last is None and "steps" in changed:
        raise UserError(
            f"config.steps is {config.steps}, but the run in {workdir} is finished with "
            f"{changed['steps'][0]} and has no checkpoint to go on from; accepted: "
            f"{changed['steps'][0]}, or another --workdir"
        )
    if last is not None and config.steps < last:
        raise UserError(
            f"config.steps is {config.steps}, but the run in {workdir} has made {last}; accepted: "
            f"at least {last}, or another --workdir"
        )
    return [
        f"config.{name}: {then!r} before, {now!r} now"
        + (f"; {_EFFECTS[name]}" if name in _EFFECTS else "")
        for name, (then, now) in changed.items()
    ]


def last_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint in a workdir, if there is one."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def _changed(config: TrainConfig, file: Path) -> dict[str, tuple[Any, Any]]:
    """Settings by their dotted names, with the value in `config.json` and the one in `config`."""
    then = flatten(json.loads(file.read_text()))
    now = flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    pairs = {key: (then.get(key), now.get(key)) for key in now | then}
    return {key.replace("/", "."): pair for key, pair in pairs.items() if pair[0] != pair[1]}


def write_settings(config: TrainConfig, workdir: Path) -> None:
    """Writes `config.json`, against which later runs in the workdir are checked."""
    if not is_main_process():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    partial = workdir / ".config.json.partial"
    partial.write_text(text)
    partial.replace(workdir / "config.json")
