"""Efficiency of answers: students, their teachers, and a model of Qwen-VL-Chat's shape.

    python -m benchmarks.efficiency [--rounds 3] [--most_gib 6] [--chips v5e v6e a100 h100] [--json]

An answer has 48 tokens, its prompt an image and 64 tokens of text. Three tables:

- computed, for every model, in bfloat16: parameters, FLOPs, bytes of parameters and cache, and the
  tokens/s that no program exceeds on a chip (`python -m moddistill.plan --answer`);
- measured, on the first device of this machine, with random weights, for models whose parameters
  take at most `--most_gib`: float32 on a CPU, where XLA computes bfloat16 by float32 copies, and
  bfloat16 elsewhere. Models take turns, each in a process of its own; medians of the rounds;
- the figures of the LLaVA-MoD paper, which were measured on one A100, next to computed ones.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_inputs import random_leaves, say
from benchmarks.head_to_head import give_back, resident_bytes
from benchmarks.processes import in_new_process
from moddistill.config import Dtype, ExpertConfig
from moddistill.distributed.accelerators import CHIPS
from moddistill.inference.decode import admit, empty_rows, step, without_drops
from moddistill.inference.prompts import bucket
from moddistill.inference.sampling import Sampling
from moddistill.models.batch import padded_batch
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm
from moddistill.planning.answers import answer_params, plan_answer
from moddistill.planning.roofline import AnswerSize, answer_compute

GIB = 2**30
TEXT, NEW = 64, 48
STUDENTS = ("qwen2-0.5b", "qwen2-1.5b", "qwen1.5-1.8b")
TEACHERS = ("qwen2-7b", "qwen1.5-7b")
QWEN_VL = "qwen-vl-chat"
QWEN_VL_IMAGE_TOKENS = 256  # to which its resampler reduces 1,024 patches
# Of appendix B.4 of the paper, LLaVA-MoD-2B and Qwen-VL-Chat-7B on one A100 with 80 GB.
PUBLISHED = {
    "parameters, G": (3.0, 9.6),
    "active parameters, G": (2.2, 9.6),
    "TFLOP": (2.3, 8.8),
    "memory, GB": (7.8, 20.4),
    "tokens/s": (38.5, 15.6),
}


def models() -> dict[str, ModelConfig]:
    """Returns the architectures: 4 experts, top 2, in every second layer of sparse ones."""
    found = {}
    for name in STUDENTS:
        found |= {f"{name} sparse": upcycle_config(preset(name), ExpertConfig())}
        found |= {f"{name} dense": preset(name)}
    return found | {name: preset(name) for name in TEACHERS} | {QWEN_VL: qwen_vl_chat()}


def qwen_vl_chat() -> ModelConfig:
    """Returns Qwen-7B, which has the shape of Qwen1.5-7B, with ViT-bigG/14 at 448 pixels.

    Two layers on each patch take the place of Qwen-VL's resampler, about 1 % of the FLOPs.
    """
    tower = VisionConfig(
        image_size=448,
        patch_size=14,
        hidden_size=1664,
        intermediate_size=8192,
        num_layers=48,
        num_heads=16,
        select_layer=-1,
        class_token=False,
    )
    return dataclasses.replace(preset("qwen1.5-7b"), vision=tower)


def size_of(name: str, config: ModelConfig) -> AnswerSize:
    """Returns the size of the answer of a model."""
    image = QWEN_VL_IMAGE_TOKENS if name == QWEN_VL else config.vision.patches
    return AnswerSize(rows=1, prompt_tokens=TEXT + image, images=1, new_tokens=NEW)


def measure(config: ModelConfig, size: AnswerSize, dtype: Dtype) -> dict[str, float]:
    """Returns seconds and peak memory of an answer, after a short one, which compiles."""
    device = jax.devices()[0]
    model = without_drops(Vlm(config, answer_compute(dtype)))
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        answer_params(config, dtype),
    )
    params = random_leaves(shapes, 0)
    batch = jax.device_put(_prompt(config, size), device)
    _answer(model, params, batch, size, new=2)
    if device.platform == "cpu":
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    prefill, token = _answer(model, params, batch, size, size.new_tokens)
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resident_bytes("VmHWM")
    return {"prefill_seconds": prefill, "token_seconds": token, "peak_bytes": peak}


def _prompt(config: ModelConfig, size: AnswerSize) -> Any:
    """Random text around the image, as a batch of one row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(
        0, config.decoder.real_ids[-1][1], (size.rows, bucket(size.prompt_tokens))
    )
    tokens[:, 1 : 1 + size.prompt_tokens - TEXT] = config.image_token_id
    side = config.vision.image_size
    images = rng.integers(0, 256, (size.rows, size.images, side, side, 3), np.uint8)
    lengths = np.full(size.rows, size.prompt_tokens)
    return padded_batch(tokens.astype(np.int32), lengths, images=images)


def _answer(model: Vlm, params: Any, batch: Any, size: AnswerSize, new: int) -> tuple[float, float]:
    """Returns seconds of the prompt, and of each of `new` tokens after the first."""
    static = {"sampling": Sampling(), "top_logprobs": 0}
    state = jax.block_until_ready(empty_rows(model, size.rows, size.slots, Sampling()))
    rngs = jax.random.split(jax.random.key(0), size.rows)
    began = time.perf_counter()
    state, choice = admit(model, params, state, batch, jnp.arange(size.rows), rngs, **static)
    jax.block_until_ready(choice)
    between = time.perf_counter()
    for _ in range(new - 1):
        state, choice = step(model, params, state, **static)
    jax.block_until_ready(choice)
    return between - began, (time.perf_counter() - between) / (new - 1)


def device_memory() -> tuple[str, float | None]:
    """Returns the kind of the first device, and its bytes; None for a CPU."""
    device = jax.devices()[0]
    return device.device_kind, (device.memory_stats() or {}).get("bytes_limit")


def run(chips: list[str], rounds: int, most_gib: float | None) -> dict[str, Any]:
    """Returns all figures: "computed" and "measured" by model, and what was measured on."""
    kind, memory = in_new_process(device_memory)
    dtype: Dtype = "float32" if memory is None else "bfloat16"
    most = GIB * (most_gib or (6 if memory is None else 0.9 * memory / GIB))
    sizes = {name: (config, size_of(name, config)) for name, config in models().items()}
    computed = {
        name: plan_answer(config, size, chips, "bfloat16", compiled=False)
        for name, (config, size) in sizes.items()
    }
    held = {
        name: plan_answer(config, size, [], dtype, compiled=False)["parameter_bytes"]
        for name, (config, size) in sizes.items()
    }
    chosen = [name for name in sizes if rounds and held[name] <= most]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in chosen:
            say(f"round {number + 1}: {name}, {held[name] / GIB:.1f} GiB of parameters")
            found[name].append(in_new_process(measure, *sizes[name], dtype))
    measured = {name: _medians(each, held[name]) for name, each in found.items()}
    return {"device": kind, "dtype": dtype, "computed": computed, "measured": measured}


def _medians(rounds: list[dict[str, float]], held: int) -> dict[str, Any]:
    median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    seconds = median["prefill_seconds"] + (NEW - 1) * median["token_seconds"]
    return median | {"tokens_per_second": NEW / seconds, "parameter_bytes": held, "rounds": rounds}


def tables(result: dict[str, Any]) -> str:
    """Formats all figures as Markdown."""
    computed, measured = result["computed"], result["measured"]
    chips = list(next(iter(computed.values()))["chips"])
    parts = [
        f"Computed: one answer of {NEW} tokens, bfloat16; tokens/s at most",
        _table(
            ["model", "parameters", "active", "prompt, TFLOP", "token, GFLOP", "memory", *chips],
            [_computed_row(name, plan) for name, plan in computed.items()],
        ),
        f"Measured: {result['device']}, {result['dtype']}",
        _table(
            ["model", "parameters", "peak", "prompt", "token", "tokens/s of the answer"],
            [_measured_row(name, each) for name, each in measured.items()],
        ),
        "Published, measured on one A100, next to what is computed here for it",
        _table(["what", "published: student, Qwen-VL-Chat", *_PAIRS], _published_rows(computed)),
    ]
    return "\n\n".join(parts)


def _computed_row(name: str, plan: dict[str, Any]) -> list[str]:
    memory = (plan["parameter_bytes"] + plan["cache_bytes"]) / GIB
    return [
        name,
        f"{plan['parameters'] / 1e9:.2f} G",
        f"{plan['active_parameters'] / 1e9:.2f} G",
        f"{plan['prefill_flops'] / 1e12:.2f}",
        f"{plan['token_flops'] / 1e9:.2f}",
        f"{memory:.2f} GiB",
        *(
            f"{chip['tokens_per_second']:,.0f}" if chip["fits"] is not False else "does not fit"
            for chip in plan["chips"].values()
        ),
    ]


def _measured_row(name: str, each: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{each['parameter_bytes'] / GIB:.2f} GiB",
        f"{each['peak_bytes'] / GIB:.2f} GiB",
        f"{each['prefill_seconds']:.3f} s",
        f"{each['token_seconds'] * 1e3:.1f} ms",
        f"{each['tokens_per_second']:.2f}",
    ]


_PAIRS = ("qwen2-1.5b sparse", "qwen1.5-1.8b sparse", QWEN_VL)


def _published_rows(computed: dict[str, Any]) -> list[list[str]]:
    """Rows of the paper's figures, and of the same figures of the models in `_PAIRS`.

    The last one, the speed, is left out unless an A100 was planned.
    """

    def figures(plan: dict[str, Any]) -> list[float]:
        memory = (plan["parameter_bytes"] + plan["cache_bytes"]) / 1e9
        chips = plan["chips"]
        speed = [chips["a100"]["tokens_per_second"]] if "a100" in chips else []
        numbers = plan["parameters"] / 1e9, plan["active_parameters"] / 1e9
        return [*numbers, plan["prefill_flops"] / 1e12, memory, *speed]

    ours = list(zip(*(figures(computed[name]) for name in _PAIRS), strict=True))
    published = list(PUBLISHED.items())[: len(ours)]
    rows = []
    for (what, pair), row in zip(published, ours, strict=True):
        cells = [f"{x:.1f} ({x / row[-1]:.0%})" for x in row[:-1]] + [f"{row[-1]:.1f}"]
        rows.append([what, f"{pair[0]} ({pair[0] / pair[1]:.0%}), {pair[1]}", *cells])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints the tables, or all figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="0 measures nothing")
    parser.add_argument("--most_gib", type=float, help="6 on a CPU, else 90 %% of the device")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e", "a100", "h100"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # here; the processes that measure use the device
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # of all rounds
        result = run(args.chips, args.rounds, args.most_gib)
    print(json.dumps(result) if args.json else tables(result))


if __name__ == "__main__":
    main()
