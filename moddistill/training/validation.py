"""Checks of the settings of a run: ranges, combinations, and divisibility over the mesh."""

import math
import operator
from collections import Counter

from jax.sharding import Mesh

from moddistill.config import (
    DistillationConfig,
    ExpertConfig,
    OnPolicyConfig,
    TrainConfig,
    UpcycleConfig,
)
from moddistill.configdict import check_values
from moddistill.distributed.sharding import BATCH_AXES, num_batch_shards
from moddistill.errors import invalid
from moddistill.teachers.alignment import check_answer_positions
from moddistill.training.stages import STAGES, is_cached, stage_of


def check_settings(config: TrainConfig) -> None:
    """Raises UserError for settings out of range, that contradict each other, or are never read."""
    check_values(config)
    _check_stage(config)
    _check_heldout(config)
    _check_tasks(config)
    _check_read(config)
    _check_losses(config)
    _check_cached(config)
    _check_on_policy(config)
    _check_length(config)
    if config.batch_size % config.grad_accum_steps:
        expected = f"a multiple of grad_accum_steps ({config.grad_accum_steps})"
        raise invalid("config.batch_size", config.batch_size, expected)


def _check_length(config: TrainConfig) -> None:
    """Raises UserError for `epochs` next to `steps`, or profiled steps that are none of the run."""
    if config.steps and config.epochs != TrainConfig.epochs:
        expected = f"{TrainConfig.epochs} (the default), since config.steps is {config.steps}"
        raise invalid("config.epochs", config.epochs, expected)
    profiled, last = config.profile_steps, config.steps or math.inf
    if profiled and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1] <= last):
        expected = f"() or (first, last) with 1 <= first <= last <= {config.steps or 'steps'}"
        raise invalid("config.profile_steps", profiled, expected)


def _check_stage(config: TrainConfig) -> None:
    """Raises UserError for settings of experts or of a teacher that the stage does not have."""
    stage = stage_of(config)
    for name, default in (("moe", ExpertConfig()), ("upcycle", UpcycleConfig())):
        value = getattr(config, name)
        if not stage.sparse and value != default:
            expected = f"its defaults, since stage {config.stage!r} makes no experts"
            raise invalid(f"config.{name}", value, expected)
    for name, default in (("teacher_quantization", "none"), ("teacher_offload", False)):
        value = getattr(config, name)
        if not config.teacher and value != default:
            raise invalid(f"config.{name}", value, f"{default!r}, since config.teacher is empty")


def _check_cached(config: TrainConfig) -> None:
    """Raises UserError for settings that a teacher from a cache cannot have."""
    if not is_cached(config):
        return
    check_cached_positions(config)
    for name in ("teacher_quantization", "teacher_offload"):
        value, default = (getattr(x, name) for x in (config, TrainConfig()))
        if value != default:
            expected = f"{default!r}, since the teacher {config.teacher!r} has no parameters"
            raise invalid(f"config.{name}", value, expected)


def _check_on_policy(config: TrainConfig) -> None:
    """Raises UserError for settings with which the student cannot answer, or learns nothing of it.

    Its answers have a divergence, but no labels.
    """
    share = config.on_policy.share
    if not share:
        if config.on_policy != OnPolicyConfig():
            expected = "its defaults, since on_policy.share is 0"
            raise invalid("config.on_policy", config.on_policy, expected)
        return
    if is_cached(config):
        expected = f"0, since the teacher {config.teacher!r} cannot score new answers"
        raise invalid("config.on_policy.share", share, expected)
    if config.data.packing:
        expected = f"False, since on_policy.share is {share}"
        raise invalid("config.data.packing", True, expected)
    if not config.distillation.kd_weight:
        expected = f"> 0, since on_policy.share is {share}"
        raise invalid("config.distillation.kd_weight", 0.0, expected)
    reads_labels = "distillation.ce_weight" in STAGES[config.stage].reads
    if share == 1 and reads_labels and config.distillation.ce_weight:
        expected = "< 1, or distillation.ce_weight=0, since answers of the student have no labels"
        raise invalid("config.on_policy.share", share, expected)


def check_cached_positions(config: TrainConfig) -> None:
    """Raises UserError for a divergence at positions that no cache has."""
    check_answer_positions(config, "since a cache has the tokens of answers only")


def _check_heldout(config: TrainConfig) -> None:
    """Raises UserError for held-out records without steps, or steps without records."""
    path, steps = config.data.heldout.path, config.heldout_steps
    if steps and not path:
        raise invalid("config.data.heldout.path", path, f"a file, since heldout_steps is {steps}")
    if path and not steps:
        expected = f">= 1, since data.heldout.path is {path!r}"
        raise invalid("config.heldout_steps", steps, expected)
    every = config.heldout_every
    if every and not steps:
        raise invalid("config.heldout_every", every, "0, since heldout_steps is 0")
    if config.keep_best and (not every or config.save_every % every):
        expected = f"a divisor of save_every {config.save_every}, since keep_best needs its metric"
        raise invalid("config.heldout_every", every, expected)


def _check_tasks(config: TrainConfig) -> None:
    """Raises UserError for steps between evaluations of nothing."""
    if config.eval_every and not config.tasks:
        raise invalid("config.eval_every", config.eval_every, "0, since config.tasks is empty")


def _check_read(config: TrainConfig) -> None:
    """Raises UserError for settings of losses that the stage does not have."""
    settings = dict.fromkeys(name for row in STAGES.values() for name in row.reads)
    for name in (name for name in settings if name not in STAGES[config.stage].reads):
        value, default = (operator.attrgetter(name)(c) for c in (config, TrainConfig()))
        # Silently ignoring a setting, such as a distillation weight in `sft`, would hide a mistake.
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
            distillation.mix != DistillationConfig().mix
            and distillation.divergence not in ("jsd", "skew_kl", "skew_reverse_kl"),
            "distillation.mix",
            "distillation.divergence=jsd, skew_kl or skew_reverse_kl",
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
            raise invalid(f"config.{name}", value, f"its default unless {reader}")


def check_batch_divides_mesh(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless rows and positions can be sharded evenly over the mesh."""
    _check_processes(mesh)
    # A step shards micro-batches, not the batch that they are slices of.
    shards, micro_batch = num_batch_shards(mesh), config.batch_size // config.grad_accum_steps
    if micro_batch % shards:
        axes = " * ".join(BATCH_AXES)
        expected = f"a multiple of the mesh's {axes} ({shards})"
        raise invalid("config.batch_size / config.grad_accum_steps", micro_batch, expected)
    if not is_whole(config.on_policy.share, micro_batch // shards):
        expected = "a share with which the student answers a whole number of the "
        expected += f"{micro_batch // shards} rows that a device has of a micro-batch"
        raise invalid("config.on_policy.share", config.on_policy.share, expected)
    if config.data.max_length % mesh.shape["tensor"]:
        expected = f"a multiple of mesh.tensor ({mesh.shape['tensor']}), which shards positions"
        raise invalid("config.data.max_length", config.data.max_length, expected)


def is_whole(share: float, rows: int) -> bool:
    """Returns whether a share of some rows is a whole number of them."""
    return math.isclose(share * rows, round(share * rows), rel_tol=1e-6)


def _check_processes(mesh: Mesh) -> None:
    """Raises UserError unless each shard of a batch is in one process, equally many in each.

    Each process reads its own rows. If two shared a shard, each would fill it with others. As
    micro-batches fill all shards evenly, so does `batch_size` all processes.
    """
    tensor = mesh.shape["tensor"]
    shards = mesh.devices.reshape(-1, tensor)  # `tensor` is the last axis
    owners = [{device.process_index for device in shard} for shard in shards]
    if max(map(len, owners)) > 1:
        expected = "a size, such as 1, with all devices of a sample in one process"
        raise invalid("config.mesh.tensor", tensor, expected)
    counts = sorted(Counter(owner for [owner] in owners).values())
    if len(set(counts)) > 1:
        raise invalid("config.mesh", counts, "equally many batch shards in each process")
