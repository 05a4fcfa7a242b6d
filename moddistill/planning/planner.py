"""Capacity planning: compiles the training step of an experiment for hardware that is not there.

Nothing is executed: parameters and batches are shapes with shardings, and memory and collectives
are those of the compiled program.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.convert.resolve import RANDOM, resolve
from moddistill.distributed import accelerators, sharding
from moddistill.errors import UserError, invalid
from moddistill.models.batch import AnyBatch, image_slots, make_batch
from moddistill.models.flops import step_flops
from moddistill.models.presets import PRESETS, preset
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import ModelConfig
from moddistill.planning.cached import cache_shape, cached_teacher
from moddistill.planning.content import step_content
from moddistill.planning.hlo_collectives import collectives
from moddistill.planning.memory import USABLE_MEMORY, compile_program, memory_per_chip
from moddistill.planning.on_policy import answer_peak, answer_work, format_answers
from moddistill.teachers import live
from moddistill.training.architectures import trained_architecture
from moddistill.training.program import Program, make_program, sides_of_stage, with_shardings
from moddistill.training.stages import is_cached, stage_of
from moddistill.training.validation import (
    check_batch_divides_mesh,
    check_settings,
    is_whole,
)


def plan(config: TrainConfig, topology: str, utilisation: float = 0.4) -> dict[str, Any]:
    """Plans an experiment on a topology: memory, collectives and FLOPs of a step, and duration.

    FLOPs and duration are of the content of rows without padding, as MFU in the metrics of a run;
    of full rows if the records are not here.

    Args:
      topology: name and sizes, as for `accelerators.parse_topology`.
      utilisation: model FLOPs utilisation that is assumed for the duration.

    Returns:
      A report for `format_report`; sizes are bytes per chip.

    Raises:
      UserError: invalid settings or topology, or a mesh or batch that does not fit.
    """
    check_settings(config)
    student, teacher = architectures(config)
    cached = cached_teacher(config, student)
    content = step_content(config, student, teacher)
    devices = accelerators.topology_devices(topology)
    _check_memory(config, topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    check_batch_divides_mesh(config, mesh)
    # Outside of the mesh context, in which even a constant would be put on devices that do not run.
    layout = None
    if teacher is not None and live.has_own_layout(teacher, student):
        layout = live.OwnLayout(teacher.decoder.real_ids, None)
    program = make_program(config, student, cached or teacher, mesh, layout)
    state = with_shardings(program.abstract_state, program.state_shardings)
    if shared := live.shares_tower(student, teacher, program.abstract_state.params):
        program = program._replace(teacher=live.without_tower(program.teacher))
    batch = abstract_batch(config, student, mesh, teacher)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        compiled = compile_program(program.step.lower(state, program.teacher, batch), topology)
        peak = None
        if config.on_policy.share:
            peak = answer_peak(config, program, state, batch, mesh, topology)
    cores = accelerators.devices_per_chip(topology)
    report = {
        "topology": topology,
        "chips": len(devices) // cores,
        "shared_tower": shared,
        "micro_batch": config.batch_size // config.grad_accum_steps,
        "batch_size": config.batch_size,
        **memory_per_chip(compiled, topology),
        "arguments": {name: cores * x for name, x in argument_bytes(program, batch).items()},
        "collectives": _collectives(compiled, len(devices)) if compiled else None,
    }
    trained, at_images = set(state.params), config.distillation.image_kd_weight > 0
    flops = step_flops(
        student,
        teacher,
        content.size,
        trained,
        shared,
        image_logits=at_images,
        sides=sides_of_stage(config),
    )
    report |= {"model_flops_per_step": flops.student, "teacher_flops_per_step": flops.teacher}
    report |= {name: getattr(content, name) for name in ("samples", "padding", "steps")}
    if config.on_policy.share:
        report |= answer_work(config, student, content.size, mesh, topology)
        # What the program of answers has no argument for stays in memory.
        others = report["arguments"]["moments"] + report["arguments"]["teacher"]
        report["answer_peak_bytes_per_chip"] = None if peak is None else peak + others
    return report | _fit_and_duration(report, topology, utilisation)


def fit(config: TrainConfig, topology: str, utilisation: float = 0.4) -> dict[str, Any]:
    """Plans with the largest micro-batch that fits, or with the smallest if none does.

    Micro-batches have equal sizes and at least one row per device.

    Raises:
      UserError: as `plan`, and for a topology of CPUs.
    """
    if accelerators.parse_topology(topology)[0] == "cpu":
        names = ", ".join(accelerators.CHIPS)
        raise invalid("topology", topology, f"one of {names} with --fit, which needs known memory")
    mesh = sharding.make_mesh(config.mesh, accelerators.topology_devices(topology))
    shards = sharding.num_batch_shards(mesh)
    size = config.batch_size
    counts = [n for n in range(1, size + 1) if size % (n * shards) == 0]
    counts = [n for n in counts if is_whole(config.on_policy.share, size // (n * shards))]
    for steps in counts or [1]:
        candidate = dataclasses.replace(config, grad_accum_steps=steps)
        report = plan(candidate, topology, utilisation)
        if report["fits"]:
            break
    return report


def architectures(config: TrainConfig) -> tuple[ModelConfig, ModelConfig | None]:
    """Returns the configs of student, upcycled, and teacher of an experiment.

    A model that does not exist yet, such as the result of an earlier stage, is that of the preset
    in its path.
    """
    student = architecture(config.student)
    if config.stage == "preference" and not student.decoder.moe:
        student = upcycle_config(student, config.moe)  # stands for the result of `d2s`
    encoder = architecture(config.vision) if config.vision else None
    student = trained_architecture(config, student, encoder)
    if not config.teacher or is_cached(config):
        return student, None
    teacher = architecture(config.teacher)
    if not Path(config.teacher).exists():  # a preset, or a model that a stage will make
        same = {"template": config.data.template, "image_token_id": student.image_token_id}
        teacher = dataclasses.replace(teacher, **same)
    live.check_teacher(teacher, student, config.teacher)
    live.check_layout(config, teacher, student, config.teacher)
    return student, teacher


def architecture(spec: str) -> ModelConfig:
    """Returns the config of a model; of the preset in its path if it does not exist yet."""
    if not spec.startswith(RANDOM) and Path(spec).exists():
        return resolve(spec).config
    names = {part for part in re.split(r"[/:]", spec) if part in PRESETS}
    if len(names) != 1:
        raise UserError(
            "model: expected an existing model folder, random:PRESET, or a path with one of "
            f"{', '.join(PRESETS)}, got {spec!r} with {' and '.join(sorted(names)) or 'none'}"
        )
    return preset(names.pop())


def abstract_batch(
    config: TrainConfig, student: ModelConfig, mesh: Mesh, teacher: ModelConfig | None = None
) -> AnyBatch:
    """Shapes of a batch as the pipeline makes it, with their sharding.

    Args:
      teacher: a live one, which may read the rows in a layout of its own.
    """
    vision, teacher_images = student.vision, None
    own_rows = teacher is not None and live.has_own_layout(teacher, student)
    if own_rows and vision and not live.has_same_images(teacher, student):
        teacher_images = image_slots(config.data, vision.patches), teacher.vision.image_size
    return make_batch(
        functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh)),
        rows=config.batch_size,
        length=config.data.max_length,
        images=(image_slots(config.data, vision.patches), vision.image_size) if vision else None,
        preference=stage_of(config).records == "preference",
        cached=cache_shape(config),
        own_rows=own_rows,
        teacher_images=teacher_images,
    )


def _check_memory(config: TrainConfig, topology: str) -> None:
    name, _ = accelerators.parse_topology(topology)
    if config.teacher_offload and name in accelerators.GPUS:
        expected = f"False for {topology!r}: without the device, only TPUs have host memory"
        raise invalid("config.teacher_offload", config.teacher_offload, expected)


def _collectives(compiled: Any, chips: int) -> dict[str, dict[str, int]] | None:
    """Returns the collectives; None where the backend cannot print its program."""
    if chips == 1:
        return {}
    try:
        return collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return None


def argument_bytes(program: Program, batch: Any) -> dict[str, int]:
    """Returns the argument bytes of one device by kind; "host" is a teacher in host memory."""
    state = with_shardings(program.abstract_state, program.state_shardings)
    parts = {
        "trained": state.params,
        "moments": state.opt_state,
        "frozen": state.frozen,
        "teacher": program.teacher,
        "batch": batch,
    }
    sizes = dict.fromkeys((*parts, "host"), 0)
    for name, part in parts.items():
        for x in jax.tree.leaves(part):
            where = "host" if x.sharding.memory_kind == "pinned_host" else name
            sizes[where] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sizes


def _fit_and_duration(report: dict[str, Any], topology: str, utilisation: float) -> dict[str, Any]:
    """Returns whether the step fits into memory, and the duration of a step and of all steps.

    Days are None if the number of steps follows from records; all are None for CPUs.
    """
    name, _ = accelerators.parse_topology(topology)
    if name == "cpu":
        return {"fits": None}
    chip = accelerators.CHIPS[name]
    allowed = round(chip.memory * USABLE_MEMORY)
    flops = report["model_flops_per_step"] + report["teacher_flops_per_step"]
    flops += report.get("answer_prompt_flops_per_step", 0.0)
    seconds = flops / (chip.flops * report["chips"] * utilisation)
    seconds += report.get("answer_token_seconds_per_step", 0.0)
    peaks = [report[name] for name in report if name.endswith("peak_bytes_per_chip")]
    return {
        "allowed_bytes_per_chip": allowed,
        "fits": all(peak is not None and peak <= allowed for peak in peaks),
        "seconds_per_step": seconds,
        "days": report["steps"] * seconds / 86400 if report["steps"] else None,
        "utilisation": utilisation,
    }


def format_report(report: dict[str, Any]) -> str:
    """Formats a report of `plan` as lines of text."""
    gib = {
        key: math.nan if value is None else value / 2**30
        for key, value in report.items()
        if key.endswith("per_chip")
    }
    lines = [
        f"{report['topology']}: {report['chips']} chips, {report['micro_batch']} rows at once",
        f"peak       {gib['peak_bytes_per_chip']:8.2f} GiB a chip",
        f"arguments  {gib['argument_bytes_per_chip']:8.2f} GiB",
    ]
    for name, size in ((name, size) for name, size in report["arguments"].items() if size):
        lines.append(f"  {name:<9}{size / 2**30:8.2f} GiB")
    lines.append(f"temporary  {gib['temp_bytes_per_chip']:8.2f} GiB")
    if report["collectives"] is None:
        lines.append("collectives are unknown: there is no program, or it cannot be printed")
    for kind, entry in (report["collectives"] or {}).items():
        lines.append(f"{kind:<18} {entry['count']:4} times, {entry['bytes'] / 2**20:10.1f} MiB")
    lines.append(f"student    {report['model_flops_per_step'] / 1e12:10.1f} TFLOP a step")
    lines.append(f"teacher    {report['teacher_flops_per_step'] / 1e12:10.1f} TFLOP a step")
    if "answer_flops_per_step" in report:
        lines += format_answers(report)
    lines.append(f"a step has {report['batch_size']:,} {_rows(report)}")
    if report["fits"] is not None:
        word = "fits" if report["fits"] else "does not fit"
        lines.append(f"{word} into {gib['allowed_bytes_per_chip']:.1f} GiB")
        lines.append(
            f"{report['seconds_per_step']:.2f} seconds a step at {report['utilisation']:.0%} "
            "utilisation"
        )
        lines.append(
            "as many steps as config.epochs takes; --config.steps=N plans their duration"
            if report["days"] is None
            else f"{report['days']:.2f} days for {report['steps']:,} steps"
        )
    return "\n".join(lines)


def _rows(report: dict[str, Any]) -> str:
    """Describes the rows of a step."""
    if report["samples"] is None:
        return "full rows, as the records are not here"
    return f"rows with {report['samples']:.0f} samples and {report['padding']:.1%} padding"
