"""Capacity planning of the answers that a student makes in training: memory, FLOPs, least time."""

import math
from typing import Any

from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.distributed import accelerators
from moddistill.distributed.sharding import num_batch_shards
from moddistill.models.flops import StepSize
from moddistill.models.vlm import ModelConfig
from moddistill.planning.memory import compile_program, memory_per_chip
from moddistill.planning.roofline import AnswerSize, Work, least_seconds, prefill_work, token_work
from moddistill.training.on_policy import make_answer
from moddistill.training.program import SUPERVISED_SHARE, Program


def answer_peak(
    config: TrainConfig, program: Program, state: Any, batch: Any, mesh: Mesh, topology: str
) -> int | None:
    """Returns the peak bytes per chip of the program of answers; None if a chip has too few.

    Moments and teacher are no arguments of it, and do not count.
    """
    student = program.model
    answer = make_answer(config, student, student.config.decoder.real_ids, end=0, mesh=mesh)
    lowered = answer.lower(state.params, state.frozen, batch, state.step)
    return memory_per_chip(compile_program(lowered, topology), topology)["peak_bytes_per_chip"]


def answer_work(
    config: TrainConfig, student: ModelConfig, content: StepSize, mesh: Mesh, topology: str
) -> dict[str, Any]:
    """Returns FLOPs and seconds of the answers of a step, all as long as they may be.

    Reading prompts has the utilisation of the step, but a token is bounded by the bytes that it
    reads: this is its least time, without collectives; None for CPUs.

    Args:
      content: of a step.
    """
    size = _size(config, content, round(config.on_policy.share * config.batch_size))
    prefill, token = (work(student, size, config.dtype) for work in (prefill_work, token_work))
    later = size.new_tokens - 1
    found = {
        "answers_per_step": size.rows,
        "answer_tokens": size.new_tokens,
        "answer_prompt_flops_per_step": prefill.flops,
        "answer_flops_per_step": prefill.flops + later * token.flops,
        "answer_token_seconds_per_step": None,
    }
    name, _ = accelerators.parse_topology(topology)
    if name != "cpu":
        passes, tensor = config.grad_accum_steps, mesh.shape["tensor"]
        part = _size(config, content, size.rows // (passes * num_batch_shards(mesh)))
        work = Work(*(x / tensor for x in token_work(student, part, config.dtype)))
        seconds = passes * later * least_seconds(work, accelerators.CHIPS[name])
        found["answer_token_seconds_per_step"] = seconds
    return found


def _size(config: TrainConfig, content: StepSize, rows: int) -> AnswerSize:
    """The size of answers in some rows; a prompt is what is not supervised of a mean row."""
    prompt = math.ceil(content.tokens * (1 - SUPERVISED_SHARE) / config.batch_size)
    images = math.ceil(content.images / config.batch_size)
    new = min(config.on_policy.tokens, config.data.max_length)
    return AnswerSize(rows, prompt, images, new)


def format_answers(report: dict[str, Any]) -> list[str]:
    """Formats what a report has of the answers of a step."""
    peak = report["answer_peak_bytes_per_chip"]
    lines = [
        f"answers    {report['answer_flops_per_step'] / 1e12:10.1f} TFLOP a step, "
        f"{report['answers_per_step']} of at most {report['answer_tokens']} tokens",
        f"answers    {'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'} at their peak",
    ]
    if report["answer_token_seconds_per_step"] is not None:
        seconds = report["answer_token_seconds_per_step"]
        lines.append(f"their tokens take {seconds:.2f} seconds a step at least")
    return lines
