"""Prompts and their batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import encode_prompt
from moddistill.data.images import load_image, mean_color, preprocess
from moddistill.data.tokenizer import Tokenizer
from moddistill.models.batch import Batch, padded_batch
from moddistill.models.vlm import ModelConfig


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with `<image>` where an image stands, the turns before it, and the image files."""

    question: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


def prompt_batch(
    prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer, multiple: int = 16
) -> Batch:
    """A batch of prompts, padded on the right to a common multiple of `multiple`."""
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
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
    count = max(len(prompt.images) for prompt in prompts)
    images = None
    if count:
        images = np.zeros((len(ids), count, tower.image_size, tower.image_size, 3), np.uint8)
        for row, prompt in enumerate(prompts):
            for slot, path in enumerate(prompt.images):
                image = preprocess(load_image(path), tower.image_size, mean_color(tower.mean))
                images[row, slot] = image
    return padded_batch(tokens, np.array([len(prompt_ids) for prompt_ids in ids]), images=images)
