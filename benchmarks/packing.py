"""Samples a second of a d2s step with packed rows, compared with rows of one sample.

    python -m benchmarks.packing [--rounds 5] [--json]

- Lengths: an index of 100,000 samples like LLaVA's, an image of 576 tokens and a log-normal number
  of text tokens with median 90 and 95th percentile 500, a quarter of the latter before the answer.
- Models: decoders of Qwen2-0.5B's width and a vision encoder of CLIP-L's, with one twelfth of their
  layers each; the student has 4 experts, top 2, in every second layer. One twelfth of the
  vocabulary too, so that the head has its usual share.
- Steps: rows of 2,048 tokens as the row plan gives them, KL, cross entropy and balance loss, AdamW,
  float32. Both steps alternate in one process.

`padding` is that of the first 20,000 samples, at rows of 2,048 and of 4,096.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moddistill.config import DataConfig, ExpertConfig, MeshConfig, OptimConfig, TrainConfig
from moddistill.convert.resolve import random_params
from moddistill.data.order import Order
from moddistill.data.packing import Row, RowPlan
from moddistill.distributed.sharding import make_mesh, put_batch
from moddistill.models.batch import Batch
from moddistill.models.decoder import DecoderConfig
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig
from moddistill.teachers.live import without_tower
from moddistill.training.program import make_program

SAMPLES, LENGTH, IMAGE_TOKENS = 100_000, 2048, 576
LAYERS, VOCABULARY = 2, 151_936 // 12
IMAGE = VOCABULARY - 1
ROWS = {"packed": 2, "unpacked": 4}  # of a step


def sample_lengths() -> np.ndarray:
    """Returns the tokens of each sample."""
    deviation = np.log(500 / 90) / 1.645  # 1.645 deviations above the median: 95th percentile
    text = np.exp(np.random.default_rng(0).normal(np.log(90), deviation, SAMPLES))
    return np.minimum(IMAGE_TOKENS + np.maximum(text, 8).astype(int), LENGTH)


def plan(lengths: np.ndarray, capacity: int, packs: bool) -> RowPlan:
    order = Order((len(lengths),), (1.0,), 0)
    return RowPlan(order, lambda window: lengths[window.record], capacity, packs)


def padding(lengths: np.ndarray, capacity: int) -> float:
    """Returns the share of positions of an epoch's packed rows that are padding."""
    return 1 - lengths.sum() / (plan(lengths, capacity, True).rows_of(1) * capacity)


def architectures() -> tuple[ModelConfig, ModelConfig]:
    """Returns student and teacher."""
    decoder = DecoderConfig(
        VOCABULARY, ((0, IMAGE),), 896, 4864, LAYERS, 14, 2, 64, tie_word_embeddings=True
    )
    tower = VisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=LAYERS,
        num_heads=16,
        select_layer=-1,
    )
    teacher = ModelConfig(decoder, tower, "mlp2x_gelu", "chatml", IMAGE)
    return upcycle_config(teacher, ExpertConfig()), teacher


def make_batch(rows: list[Row], slots: int) -> Batch:
    """Returns a batch of random tokens and images in the layout of some rows."""
    rng = np.random.default_rng(0)
    shape = (len(rows), LENGTH)
    tokens = rng.integers(0, IMAGE, shape).astype(np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            at = slice(start, start + sample.length)
            positions[number, at] = np.arange(sample.length)
            segments[number, at] = segment
            tokens[number, start : start + IMAGE_TOKENS] = IMAGE
            text = sample.length - IMAGE_TOKENS
            loss_mask[number, start + IMAGE_TOKENS + text // 4 : start + sample.length] = True
            start += sample.length
    images = rng.integers(0, 256, (len(rows), slots, 336, 336, 3)).astype(np.uint8)
    return Batch(tokens, positions, segments, loss_mask, images)


def make_step(side: str, lengths: np.ndarray) -> tuple[Callable[[], Any], int]:
    """Returns a function that runs one step, and the number of its samples."""
    packs = side == "packed"
    rows_of = plan(lengths, LENGTH, packs)
    rows = [rows_of.row(number) for number in range(ROWS[side])]
    student, teacher = architectures()
    config = TrainConfig(
        stage="d2s",
        student="student",
        teacher="teacher",
        steps=1000,
        dtype="float32",
        batch_size=len(rows),
        data=DataConfig(max_length=LENGTH, packing=packs),
        optim=OptimConfig(lr=1e-4),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = make_program(config, student, teacher, mesh)
    params = random_params(student, mesh, jax.random.key(0))
    make_state = jax.jit(program.make_state, out_shardings=program.state_shardings)
    state = make_state(params)
    frozen = without_tower(random_params(teacher, mesh, jax.random.key(1)))
    batch = put_batch(mesh, make_batch(rows, slots=3 if packs else 1))

    def run() -> Any:
        nonlocal state
        state, metrics = jax.block_until_ready(program.step(state, frozen, batch))
        return metrics

    return run, sum(map(len, rows))


def compare(rounds: int) -> dict[str, Any]:
    """Returns samples a second of both sides, their ratio, and shares of padding."""
    lengths = sample_lengths()
    sides = {side: make_step(side, lengths) for side in ROWS}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            if number:  # the first step compiles
                seconds[side].append(time.perf_counter() - start)
    speed = {side: count / statistics.median(seconds[side]) for side, (_, count) in sides.items()}
    return {
        "samples_per_second": speed,
        "speedup": speed["packed"] / speed["unpacked"],
        "padding": {str(rows): padding(lengths[:20_000], rows) for rows in (2048, 4096)},
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side that are timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = compare(args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for side, speed in result["samples_per_second"].items():
        print(f"{side:<9} {speed:.2f} samples/s")
    print(f"speedup   {result['speedup']:.2f}")
    for rows, share in result["padding"].items():
        print(f"padding   {share:.1%} of rows of {rows} tokens")


if __name__ == "__main__":
    main()
