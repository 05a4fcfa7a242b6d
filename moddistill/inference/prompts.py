"""Prompts, and batches of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import encode_prompt
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import load_image, mean_color, preprocess
from moddistill.data.tokenizer import Tokenizer
from moddistill.models.batch import Batch, padded_batch
from moddistill.models.vlm import ModelConfig

BUCKET = 16  # prompt lengths are padded to multiples of this, which limits compilations


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with `<image>` once for every image, its image files, and the earlier turns."""

    question: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


def encode_prompts(
    prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer
) -> list[list[int]]:
    """Returns the token ids of each prompt, the image id repeated once per patch.

    Raises:
      UserError: if `<image>` does not occur once for every image of a prompt.
    """
    patches = config.vision.patches if config.vision else 0
    return [
        encode_prompt(
            config.template, prompt.history, prompt.question, len(prompt.images), tokenizer, patches
        )
        for prompt in prompts
    ]


def padded_length(ids: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest prompt, rounded up to a multiple of `BUCKET`."""
    return -max(map(len, ids)) // BUCKET * -BUCKET


def prompt_batch(prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer) -> Batch:
    """Returns prompts as rows padded on the right to a common length, with their images.

    Raises:
      UserError: if `<image>` does not occur once for every image of a prompt.
    """
    ids = encode_prompts(prompts, config, tokenizer)
    tokens = np.full((len(ids), padded_length(ids)), tokenizer.pad_id, np.int32)
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
    images = _images(prompts, config) if any(prompt.images for prompt in prompts) else None
    return padded_batch(tokens, np.array(list(map(len, ids))), images=images)


def _images(prompts: Sequence[Prompt], config: ModelConfig) -> np.ndarray:
    """Preprocessed images [B, I, h, w, 3] uint8, zeros in unused slots."""
    # One array serves the batch: every row has as many slots as the one with most images. Slots
    # without an image are encoded too, but no placeholder reads their features.
    tower = config.vision
    pad_color = mean_color(tower.mean)
    rules = ImageRules(pad_color=pad_color)
    count = max(len(prompt.images) for prompt in prompts)
    images = np.zeros((len(prompts), count, tower.image_size, tower.image_size, 3), np.uint8)
    for row, prompt in enumerate(prompts):
        for slot, path in enumerate(prompt.images):
            image = load_image(path, rules)
            images[row, slot] = preprocess(image, tower.image_size, pad_color)
    return images
