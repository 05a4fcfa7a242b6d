"""Prompts, and batches of them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from moddistill.data import examples
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import load_image, mean_color, preprocess
from moddistill.data.records import IMAGE, check_unicode
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, invalid
from moddistill.models.batch import Batch, padded_batch
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig

_SHORTEST = 16  # multiples of which lengths are rounded up to, at least


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with `<image>` once for every image, its images, and the earlier turns.

    Attributes:
      images: files, RGB images, or functions that return one of these, called when they are needed.
        Those of several prompts are read once if they are equal: the same file or object, or equal
        functions.
      system: system prompt in place of the template's.
    """

    question: str
    images: tuple[str | Image.Image | Callable[[], str | Image.Image], ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None


def with_images(question: str, count: int) -> str:
    """Returns a question that has `<image>`, or one with it for each of `count` images first."""
    return question if IMAGE in question else f"{IMAGE}\n" * count + question


def encode_prompt(prompt: Prompt, config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a prompt, the image id repeated once per patch.

    Raises:
      UserError: the question is empty, a text is no valid Unicode, `<image>` does not occur once
        for every image, or the context of the model has no place for an answer.
    """
    if not prompt.question.strip():
        raise invalid("prompt", prompt.question, "a text or an image")
    for text in (prompt.system or "", *itertools.chain(*prompt.history), prompt.question):
        check_unicode(text)
    patches = config.vision.patches if config.vision else 0
    ids = examples.encode_prompt(
        config.template,
        prompt.history,
        prompt.question,
        len(prompt.images),
        tokenizer,
        patches,
        prompt.system,
    )
    if config.context and len(ids) >= config.context:
        parts = f"{patches} for each image" if prompt.images else "no images"
        expected = f"fewer tokens than the context of the model, {config.context} ({parts}); "
        expected += "a shorter question, fewer images or earlier turns"
        raise UserError(f"prompt: expected {expected}, got {len(ids)} tokens")
    return ids


def bucket(length: int) -> int:
    """Returns a length rounded up, which limits compilations.

    Below 128 to a multiple of 16, from there on by an eighth at most.
    """
    multiple = max(_SHORTEST, 2 ** (length.bit_length() - 4))
    return -length // multiple * -multiple


def load_images(prompt: Prompt, tower: VisionConfig | None) -> np.ndarray | None:
    """Preprocessed images of a prompt, [I, h, w, 3] uint8; None if there are none.

    Raises:
      UserError: a file cannot be read.
    """
    if not prompt.images or tower is None:
        return None
    pad_color = mean_color(tower.mean)
    rules = ImageRules(pad_color=pad_color)
    images = np.zeros((len(prompt.images), tower.image_size, tower.image_size, 3), np.uint8)
    for slot, image in enumerate(prompt.images):
        if callable(image):
            image = image()
        if not isinstance(image, Image.Image):
            image = load_image(image, rules)
        images[slot] = preprocess(image, tower.image_size, pad_color)
    return images


def prompt_batch(
    ids: Sequence[Sequence[int]], images: Sequence[np.ndarray | None], pad_id: int
) -> Batch:
    """Returns prompts as rows padded on the right to a common bucket.

    Args:
      images: of each prompt, [I, h, w, 3]. Rows have as many slots as the one with most images.
        Those without an image are encoded too, but no placeholder reads their features.
    """
    lengths = list(map(len, ids))
    tokens = np.full((len(ids), bucket(max(lengths))), pad_id, np.int32)
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
    parts = {row: part for row, part in enumerate(images) if part is not None}
    if not parts:
        return padded_batch(tokens, np.array(lengths))
    slots, shape = max(map(len, parts.values())), next(iter(parts.values())).shape[1:]
    filled = np.zeros((len(ids), slots, *shape), np.uint8)
    for row, part in parts.items():
        filled[row, : len(part)] = part
    return padded_batch(tokens, np.array(lengths), images=filled)
