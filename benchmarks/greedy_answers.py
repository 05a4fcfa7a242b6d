"""Greedy answers against `transformers`: 64 tokens after each of 50 prompts with 0 to 3 images.

    python -m benchmarks.greedy_answers

A dense model and a sparse one with random weights, in float32. `transformers` answers the prompts
one by one. Ours are answered together, one by one, and in rows of exact length; each of the three
must have the tokens of `transformers`.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.engines.__main__ import make_models

_NEW, _PROMPTS = 64, 50
_EXACT = 10  # prompts that are answered in rows of exact length, each by programs of its own
_WORDS = ("what", "is", "in", "this", "image", "and", "why", "which", "colour", "the", "shape")


def questions(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Returns random questions with their image files, which it writes."""
    rng, made = np.random.default_rng(0), []
    for number in range(_PROMPTS):
        files = [str(folder / f"{number}-{place}.png") for place in range(rng.integers(4))]
        for file in files:
            patches = rng.integers(0, 256, (6, 6, 3), np.uint8)
            Image.fromarray(patches).resize(tuple(rng.integers(20, 90, 2))).save(file)
        made.append((" ".join(rng.choice(_WORDS, rng.integers(1, 40))) + "?", tuple(files)))
    return made


def in_transformers(export: Path, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[int]]:
    """Returns the tokens of `_NEW` steps, past the end of an answer."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    found = []
    for question, files in asked:
        content = [{"type": "image"}] * len(files) + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(file) for file in files] or None
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=_NEW, eos_token_id=-1)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def ours(model: Path, asked: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, Any]]:
    """Yields how prompts are answered, and the tokens."""
    import jax

    from moddistill.convert.resolve import load
    from moddistill.data.tokenizer import load_tokenizer
    from moddistill.inference import generation, prompts
    from moddistill.inference.answer import Decoding
    from moddistill.inference.generation import answer
    from moddistill.inference.prompts import Prompt

    generation.end_id = lambda *_: -1  # answers have full length
    loaded = (*load(model, stacked=False), load_tokenizer(str(model)))
    made = [Prompt("<image>\n" * len(files) + text, files) for text, files in asked]
    decoding = Decoding(max_new_tokens=_NEW)
    yield "together", [each.token_ids for each in answer(*loaded, made, decoding)]
    yield "one by one", [answer(*loaded, [each], decoding)[0].token_ids for each in made]
    generation.bucket = prompts.bucket = lambda length: length
    exact = []
    for each in made[:_EXACT]:
        exact.append(answer(*loaded, [each], decoding)[0].token_ids)
        jax.clear_caches()  # of programs for this length
    yield "one by one, in rows of exact length", exact


def main() -> None:
    """Prints how many answers are equal, and exits with 1 if one is not."""
    from moddistill.convert.exporting import export_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, differs = questions(folder), False
        for model in make_models(folder):
            export = folder / f"{model.name}-hf"
            export_model(model, export, max_shard_size=10**10)
            wanted = in_transformers(export, asked)
            distinct = len({token for tokens in wanted for token in tokens})
            for how, found in ours(model, asked):
                equal = sum(a == b for a, b in zip(wanted, found, strict=False))
                differs |= equal < len(found)
                print(
                    f"{model.name}, {how}: {equal} of {len(found)} answers of {_NEW} tokens are "
                    f"those of transformers ({distinct} different tokens)",
                    flush=True,
                )
    sys.exit(differs)


if __name__ == "__main__":
    main()
