"""Timings of `benchmarks.device`: the step of sparse distillation at the sizes of real models."""

import math
import statistics
import time
from typing import Any, NamedTuple

import jax

from benchmarks.device_inputs import on, random_batch, random_leaves, random_state, say
from benchmarks.device_timings import Left
from moddistill.config import DataConfig, TrainConfig
from moddistill.distributed import sharding
from moddistill.distributed.accelerators import peak_flops
from moddistill.models.batch import num_samples, num_tokens
from moddistill.models.flops import StepSize, step_flops
from moddistill.models.vlm import ModelConfig
from moddistill.planning.memory import peak_bytes
from moddistill.planning.planner import abstract_batch, architectures
from moddistill.teachers.live import shares_tower, without_tower
from moddistill.training.program import full_step_size, make_program, with_shardings

GIB = 2**30
_STEPS = 10


class Pair(NamedTuple):
    """Student and teacher presets, samples per step, and the device memory that they need."""

    student: str
    teacher: str
    batch: int
    needs: float


# Largest first. The first pair is that of the paper's ablations.
PAIRS = (
    Pair("qwen1.5-1.8b", "qwen1.5-7b", 8, 46 * GIB),
    Pair("qwen2-0.5b", "qwen2-7b", 8, 28 * GIB),
    Pair("qwen1.5-0.5b", "qwen1.5-1.8b", 4, 14 * GIB),
)
_TINY = Pair("tiny", "tiny-teacher", 4, 0)


def paper_step(device: Any, tiny: bool, left: Left, packing: bool = False) -> dict[str, Any]:
    """Times the sparse distillation step of the largest pair that fits: the paper's, if it does.

    Args:
      packing: rows of several samples, each with an image, in place of rows of one sample.
    """
    fitting = [pair for pair in PAIRS if pair.needs <= _memory_limit(device)]
    if not (tiny or fitting):
        least = PAIRS[-1].needs / GIB
        return {"status": "skipped", "reason": f"less than {least:.0f} GiB of device memory"}
    return _d2s(_TINY if tiny else fitting[0], device, 64 if tiny else 2048, packing, left)


def packed_step(device: Any, tiny: bool, left: Left) -> dict[str, Any]:
    """Times the same step with packed rows, the default of training."""
    return paper_step(device, tiny, left, packing=True)


def second_step(device: Any, tiny: bool, left: Left) -> dict[str, Any]:
    """Times the step of the next smaller pair."""
    fitting = [pair for pair in PAIRS if pair.needs <= _memory_limit(device)]
    if len(fitting) < 2 or tiny:
        return {"status": "skipped", "reason": "no second pair fits this device"}
    return _d2s(fitting[1], device, 2048, False, left)


def _memory_limit(device: Any) -> float:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0)


def _peak_in_use(device: Any) -> int:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def _d2s(pair: Pair, device: Any, length: int, packing: bool, left: Left) -> dict[str, Any]:
    config = TrainConfig(
        stage="d2s",
        student=f"random:{pair.student}",
        teacher=f"random:{pair.teacher}",
        batch_size=pair.batch,
        data=DataConfig(max_length=length, packing=packing),
    )
    with on(device) as mesh:
        student, teacher = architectures(config)
        program = make_program(config, student, teacher, mesh)
        shapes = with_shardings(program.abstract_state, program.state_shardings)
        taught = program.teacher
        if shared := shares_tower(student, teacher, program.abstract_state.params):
            taught = without_tower(taught)
        say(f"  compiling {pair.student} from {pair.teacher}")
        began = time.perf_counter()
        lowered = program.step.lower(shapes, taught, abstract_batch(config, student, mesh))
        step = lowered.compile()
        compiling = time.perf_counter() - began
        planned = peak_bytes(step.memory_analysis(), device.platform)
        say(f"  compiled in {compiling:.0f} s, needs {planned / GIB:.2f} GiB; initialising")
        earlier = _peak_in_use(device)
        taught = random_leaves(taught, 1)
        state = random_state(shapes, 0)
        batch = random_batch(config, student, mesh, full=True)
        seconds, losses = _run(step, state, taught, sharding.put_batch(mesh, batch), left)
        measured = _peak_in_use(device)
    size = _content(config, student, batch)
    flops = step_flops(student, teacher, size, set(program.abstract_state.params), shared)
    figures = {
        "student": pair.student,
        "teacher": pair.teacher,
        "batch": pair.batch,
        "length": length,
        "samples": int(num_samples(batch)),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "losses": losses,
        "compile_seconds": compiling,
        "tokens": int(num_tokens(batch)),
        "student_flops": flops.student,
        "teacher_flops": flops.teacher,
        "peak_flops": peak_flops([device]),
        "planned_peak_bytes": planned,
        # Unknown if an earlier section had a higher peak.
        "measured_peak_bytes": measured if measured > earlier else None,
    }
    figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
    figures["flops_per_second"] = (flops.student + flops.teacher) / figures["seconds"]
    if peak := figures["peak_flops"]:
        figures["share_of_peak"] = figures["flops_per_second"] / peak
    return figures | {"table": [_describe_step(figures)]}


def _content(config: TrainConfig, student: ModelConfig, batch: Any) -> StepSize:
    """The step's content: attention is counted within samples."""
    size, samples = full_step_size(config, student), int(num_samples(batch))
    return size._replace(squared_lengths=size.tokens**2 / samples)  # of equal lengths


def _run(
    step: Any, state: Any, taught: Any, batch: Any, left: Left
) -> tuple[list[float], list[float]]:
    """Returns seconds of at least three steps after two warm-up steps, and losses of all steps."""
    seconds, losses = [], []
    for number in range(2 + _STEPS):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, taught, batch))
        taken = time.perf_counter() - began
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        say(f"  step {number}: {1000 * taken:.1f} ms, loss {losses[-1]:.4f}")
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} in step {number}")
        seconds += [taken] if number >= 2 else []
        if len(seconds) >= 3 and left() <= 0:
            break
    return seconds, losses


def _describe_step(figures: dict[str, Any]) -> list[str]:
    speed = figures["flops_per_second"]
    has_peak = "share_of_peak" in figures
    share = f" ({figures['share_of_peak']:.1%} of the stated peak)" if has_peak else ""
    measured = figures["measured_peak_bytes"]
    measured_text = "" if measured is None else f", measured {measured / GIB:.2f}"
    return [
        f"d2s step, {figures['student']} (4 experts, top 2) from {figures['teacher']}, "
        f"{figures['batch']} x {figures['length']:,}, {figures['samples']} samples, bfloat16",
        f"{1000 * figures['seconds']:,.1f} ms; {figures['tokens_per_second']:,.0f} "
        f"tokens/s; {speed / 1e12:.1f} TFLOP/s{share}; "
        f"peak {figures['planned_peak_bytes'] / GIB:.2f} GiB planned{measured_text}; "
        f"compiled in {figures['compile_seconds']:.0f} s",
    ]
