"""Prompts and their batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import encode_prompt
from moddistill.data.images import load_image, mean_color, preprocess
from moddistill.data.tokenizer import Tokenizer
from moddistill.models.vlm import ModelConfig


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with `<image>` where an image stands, the turns before it, and the image files."""

    question: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


def prompt_batch(
    prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer, multiple: int = 16
) -> dict[str, np.ndarray]:
    """Arrays of a batch of prompts, padded on the right to a common multiple of `multiple`."""
    tower = config.vision
    patches = tower.patches if tower else 0
    ids = [
        encode_prompt(
            config.template, prompt.history, prompt.question, len(prompt.images), tokenizer, patches
        )
        for prompt in prompts
    ]
    length = -max(map(len, ids)) // multiple * -multiple
    tokens = np.full((len(ids), length), tokenizer.pad_id, np.int32)
    segments = np.zeros((len(ids), length), np.int32)
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
        segments[row, : len(prompt_ids)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    count = max(len(prompt.images) for prompt in prompts)
    if count:
        shape = (len(ids), count, tower.image_size, tower.image_size, 3)
        batch["images"] = np.zeros(shape, np.uint8)
        for row, prompt in enumerate(prompts):
            for slot, path in enumerate(prompt.images):
                image = preprocess(load_image(path), tower.image_size, mean_color(tower.mean))
                batch["images"][row, slot] = image
    return batch
