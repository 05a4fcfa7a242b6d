"""Decoding against `transformers`: tokens a second and peak memory, on a CPU in float32.

    python -m benchmarks.decoding [--rounds 3]

Qwen2-0.5B with CLIP ViT-L/14-336 and random weights, the same on both sides, a prompt of an image
and text, 48 new tokens, batches of 1 and 8. The sides take turns, each in a process of its own.
Time is that between the first and the last new token. Peak memory is that of answering, without
loading; the file of weights is not mapped on either side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.head_to_head import MIB, give_back, resident_bytes
from benchmarks.models import clip_pixels, load_in_torch, random_params, save_both

_NEW = 48
_BATCHES = (1, 8)
_QUESTION = "what is shown in this image, and where might it have been taken?"


def make_files(folder: Path) -> None:
    """Writes a model of which any id is a token, and its export; and images."""
    from PIL import Image

    from moddistill.data.tokenizer import train_bpe
    from moddistill.models.presets import preset, with_vocabulary

    tokenizer = train_bpe(["a small tokenizer"], 300)
    config = with_vocabulary(preset("qwen2-0.5b"), tokenizer.real_ids, tokenizer.image_id)
    save_both(folder, "model", config, random_params(config, 0))
    for number in range(max(_BATCHES)):
        pixels = np.random.default_rng(number).integers(0, 256, (336, 336, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def ours(folder: Path, rows: int) -> Callable[[], list[float]]:
    """Returns a function that makes answers, and returns the time of each step."""
    from moddistill.convert.resolve import load
    from moddistill.data.tokenizer import load_tokenizer
    from moddistill.inference import generation
    from moddistill.inference.answer import Decoding, Writing
    from moddistill.inference.prompts import Prompt

    model, params = load(folder / "model", stacked=False)
    tokenizer = load_tokenizer(str(folder / "model"))
    generation.end_id = lambda *_: -1  # answers have full length
    prompts = [Prompt(f"<image>\n{_QUESTION}", (str(folder / f"{n}.png"),)) for n in range(rows)]

    def run() -> list[float]:
        times, add = [], Writing.add

        def timed(*args: Any) -> None:
            times.append(time.perf_counter())
            add(*args)

        Writing.add = timed
        decoding = Decoding(max_new_tokens=_NEW)
        found = generation.answer(model, params, tokenizer, prompts, decoding)
        Writing.add = add
        assert {len(each.token_ids) for each in found} == {_NEW}
        return times[rows - 1 :: rows]

    return run


def theirs(folder: Path, rows: int) -> Callable[[], list[float]]:
    """Returns the same function with `generate` of `transformers`."""
    import torch
    from PIL import Image

    from moddistill.data.tokenizer import load_tokenizer

    model = load_in_torch(folder, "model").eval()
    tokenizer = load_tokenizer(str(folder / "model-hf"))
    model.generation_config.suppress_tokens = None  # would be a list of all ids without a token
    image_id = model.config.image_token_id
    text = tokenizer.encode(_QUESTION)
    tokens = torch.tensor([[*text[:16], *[image_id] * 576, *text]] * rows)
    images = np.stack([np.asarray(Image.open(folder / f"{n}.png")) for n in range(rows)])

    def run() -> list[float]:
        times: list[float] = []

        def timed(_: Any, scores: Any) -> Any:  # of a step, before its tokens are chosen
            times.append(time.perf_counter())
            return scores

        with torch.inference_mode():
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=clip_pixels(images),
                do_sample=False,
                max_new_tokens=_NEW,
                min_new_tokens=_NEW,
                logits_processor=[timed],
            )
        assert found.shape[1] == tokens.shape[1] + _NEW
        return times

    return run


SIDES = {"moddistill": ours, "transformers": theirs}


def measure(side: str, folder: Path, rows: int) -> None:
    """Prints the figures of one side as JSON, in its own process."""
    run = SIDES[side](folder, rows)
    run()  # compiles
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.perf_counter()
    times = run()
    whole = time.perf_counter() - began
    rate = rows * (len(times) - 1) / (times[-1] - times[0])
    peak = resident_bytes("VmHWM")
    print(json.dumps({"rate": rate, "whole": whole, "peak": peak}))


def main() -> None:
    """Prints medians, and the ratios of the two sides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=_BATCHES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        program = f"from benchmarks import decoding as d; d.make_files(d.Path({name!r}))"
        subprocess.run([sys.executable, "-c", program], check=True)
        for rows in args.batches:
            found: dict[str, list[dict]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side, figures in found.items():
                    command = [sys.executable, "-m", "benchmarks.decoding", side, name, str(rows)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    figures.append(json.loads(done.stdout.splitlines()[-1]))
            medians = {
                side: {key: statistics.median(x[key] for x in figures) for key in figures[0]}
                for side, figures in found.items()
            }
            for side, each in medians.items():
                print(
                    f"batch {rows}, {side:>12}: {each['rate']:6.2f} tokens/s, whole answer "
                    f"{each['whole']:6.2f} s, peak {each['peak'] / MIB:6.0f} MiB"
                )
            mine, other = medians.values()
            print(
                f"batch {rows}: {mine['rate'] / other['rate']:.2f} times the tokens/s, "
                f"{mine['peak'] / other['peak']:.2f} times the peak memory"
            )


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in SIDES:
        measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
