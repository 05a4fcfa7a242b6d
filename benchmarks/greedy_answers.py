"""Greedy answers against `transformers`: 64 tokens after each of 50 prompts with 0 to 3 images.

    python -m benchmarks.greedy_answers

A dense model and a sparse one with random weights, in float32. `transformers` answers the prompts
one by one. Ours are answered together, one by one, and in rows of exact length; each of the three
must have the tokens of `transformers`. Where an answer differs, the logits of both tokens are
computed in float64: closer than `_ROUNDING`, float32 cannot tell which one is larger.
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
_ROUNDING = 1e-5
_WORDS = ("what", "is", "in", "this", "image", "and", "why", "which", "colour", "the", "shape")

Asked = tuple[str, tuple[str, ...]]


def questions(folder: Path) -> list[Asked]:
    """Returns random questions with their image files, which it writes."""
    rng, made = np.random.default_rng(0), []
    for number in range(_PROMPTS):
        files = [str(folder / f"{number}-{place}.png") for place in range(rng.integers(4))]
        for file in files:
            patches = rng.integers(0, 256, (6, 6, 3), np.uint8)
            Image.fromarray(patches).resize(tuple(rng.integers(20, 90, 2))).save(file)
        made.append((" ".join(rng.choice(_WORDS, rng.integers(1, 40))) + "?", tuple(files)))
    return made


class InTransformers:
    """The export of a model in `transformers`, in float32."""

    def __init__(self, export: Path):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.torch, self.processor = torch, AutoProcessor.from_pretrained(export)
        load = AutoModelForImageTextToText.from_pretrained
        self.model = load(export, dtype=torch.float32).eval()

    def inputs(self, question: str, files: Sequence[str]) -> Any:
        """Returns ids, mask and pixels of a prompt."""
        content = [{"type": "image"}] * len(files) + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        template = self.processor.apply_chat_template
        text = template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(file) for file in files] or None
        return self.processor(images=images, text=text, return_tensors="pt")

    def answer(self, question: str, files: Sequence[str]) -> list[int]:
        """Returns the tokens of `_NEW` steps, past the end of an answer."""
        inputs = self.inputs(question, files)
        with self.torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=_NEW, eos_token_id=-1)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def gap(self, asked: Asked, one: Sequence[int], other: Sequence[int]) -> float:
        """Returns the difference in float64 of the logits at which two answers part."""
        torch, inputs = self.torch, self.inputs(*asked)
        place = next(i for i, pair in enumerate(zip(one, other, strict=True)) if len({*pair}) == 2)
        ids = torch.cat([inputs["input_ids"], torch.tensor([one[:place]]).long()], dim=1)
        pixels = {k: x.double() for k, x in inputs.items() if k == "pixel_values"}
        with torch.no_grad():
            logits = self.model.double()(input_ids=ids, **pixels).logits[0, -1]
        self.model.float()
        return float(logits[one[place]] - logits[other[place]])


def ours(model: Path, asked: Sequence[Asked]) -> Iterator[tuple[str, list[list[int]]]]:
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
    decoding, bucket = Decoding(max_new_tokens=_NEW), prompts.bucket
    yield "together", [each.token_ids for each in answer(*loaded, made, decoding)]
    yield "one by one", [answer(*loaded, [each], decoding)[0].token_ids for each in made]
    generation.bucket = prompts.bucket = lambda length: length
    exact = []
    for each in made[:_EXACT]:
        exact.append(answer(*loaded, [each], decoding)[0].token_ids)
        jax.clear_caches()  # of programs for this length
    generation.bucket = prompts.bucket = bucket
    yield "one by one, in rows of exact length", exact


def compare(model: Path, export: Path, asked: Sequence[Asked]) -> bool:
    """Prints the comparison of a model; returns whether an answer differs by more than rounding."""
    theirs = InTransformers(export)
    wanted = [theirs.answer(*each) for each in asked]
    distinct, differs = len({token for tokens in wanted for token in tokens}), False
    for how, found in ours(model, asked):
        pairs = [pair for pair in zip(asked, wanted, found, strict=False) if pair[1] != pair[2]]
        print(
            f"{model.name}, {how}: {len(found) - len(pairs)} of {len(found)} answers of {_NEW} "
            f"tokens are those of transformers ({distinct} different tokens)",
            flush=True,
        )
        for pair in pairs:
            gap = theirs.gap(*pair)
            print(f"  one parts at two tokens whose logits differ by {gap:.1e} in float64")
            differs |= abs(gap) > _ROUNDING
    return differs


def main() -> None:
    """Exits with 1 if an answer differs."""
    from moddistill.convert.exporting import export_model

    with tempfile.TemporaryDirectory() as name:
        folder, differs = Path(name), False
        asked = questions(folder)
        for model in make_models(folder):
            export = folder / f"{model.name}-hf"
            export_model(model, export, max_shard_size=10**10)
            differs |= compare(model, export, asked)
    sys.exit(differs)


if __name__ == "__main__":
    main()
