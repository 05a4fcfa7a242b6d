"""Samples of one fixed shape from records: tokens, loss mask and images.

T: max_length, I: max_images, h = w: image_size.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.chat_template import Piece, prompt, render
from moddistill.data.images import PAD_COLOR, load_image, preprocess
from moddistill.data.records import IMAGE, PreferencePair, Record
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, invalid
from moddistill.models.batch import Batch, PreferenceBatch, num_tokens, padded_batch


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """Template and fixed shapes of samples.

    Attributes:
      image_tokens: patches per image; 0 for a model without a vision encoder.
      pad_color: colour, 0 to 255, that pads images to squares.
    """

    template: str
    max_length: int
    max_images: int
    image_size: int
    image_tokens: int
    pad_color: tuple[int, int, int] = PAD_COLOR


def make_example(record: Record, tokenizer: Tokenizer, spec: ExampleSpec) -> tuple[Batch, int]:
    """Makes the sample of a conversation, truncated to `max_length`.

    Returns:
      The sample, without batch dimension, and its number of tokens before truncation.

    Raises:
      UserError: too many images, images beyond `max_length`, no supervised token within it, or
        an image file that cannot be decoded.
    """
    _check_images(record.images, spec)
    ids, mask = _encode(render(spec.template, record.turns), tokenizer, spec.image_tokens)
    if len(ids) > spec.max_length:
        _check_truncation(ids, mask, tokenizer.image_id, spec.max_length)
    sample = _padded(ids[: spec.max_length], mask[: spec.max_length], tokenizer.pad_id, spec)
    return sample._replace(images=_read_images(record.images, spec)), len(ids)


def make_preference(
    pair: PreferencePair, tokenizer: Tokenizer, spec: ExampleSpec
) -> tuple[PreferenceBatch, int]:
    """Makes both sides of a preference pair, in which only the last answer is supervised.

    Returns:
      The sample, without batch dimension, and the number of tokens of the longer side.

    Raises:
      UserError: as `make_example`, and for a side longer than `max_length`, since a truncated
        answer has another probability.
    """
    _check_images(pair.images, spec)
    chosen = _preference_side(pair, pair.chosen, "chosen", tokenizer, spec)
    rejected = _preference_side(pair, pair.rejected, "rejected", tokenizer, spec)
    length = max(int(num_tokens(side)) for side in (chosen, rejected))
    images = _read_images(pair.images, spec)
    return PreferenceBatch(chosen=chosen, rejected=rejected, images=images), length


def encode_prompt(
    template: str,
    turns: Sequence[tuple[str, str]],
    question: str,
    images_count: int,
    tokenizer: Tokenizer,
    image_tokens: int,
) -> list[int]:
    """Encodes a generation prompt, with the image id repeated per patch.

    Raises:
      UserError: the number of `<image>` is not that of the images, or there are images for a
        text-only model.
    """
    pieces = prompt(template, turns, question)
    placeholders = pieces.count(Piece(IMAGE, special=True))
    if placeholders != images_count:
        raise invalid(f"number of {IMAGE}", placeholders, f"{images_count}, one per image")
    if images_count and not image_tokens:
        raise invalid("images of the prompt", images_count, "none for a text-only model")
    return _encode(pieces, tokenizer, image_tokens)[0]


def _preference_side(
    pair: PreferencePair, answer: str, side: str, tokenizer: Tokenizer, spec: ExampleSpec
) -> Batch:
    pieces = render(spec.template, (*pair.history, (pair.question, answer)))
    # The prompt is a prefix of the pieces; earlier answers in it are context, not supervised.
    prompt_length = len(prompt(spec.template, pair.history, pair.question))
    context = [piece._replace(supervised=False) for piece in pieces[:prompt_length]]
    ids, mask = _encode(context + pieces[prompt_length:], tokenizer, spec.image_tokens)
    if len(ids) > spec.max_length:
        raise invalid(f"tokens of {side}", len(ids), f"<= max_length {spec.max_length}")
    return _padded(ids, mask, tokenizer.pad_id, spec)


def _encode(
    pieces: Sequence[Piece], tokenizer: Tokenizer, image_tokens: int
) -> tuple[list[int], list[bool]]:
    """Returns ids, with the image id repeated per patch, and loss mask of pieces."""
    ids, mask = [], []
    for piece in pieces:
        if not piece.special:
            new = tokenizer.encode(piece.text)
        elif piece.text == IMAGE:
            new = [tokenizer.image_id] * image_tokens
        else:
            new = [tokenizer.special(piece.text)]
        ids += new
        mask += [piece.supervised] * len(new)
    return ids, mask


def _check_images(images: Sequence[str], spec: ExampleSpec) -> None:
    if images and not spec.image_tokens:
        raise invalid("images of the record", len(images), "none for a text-only model")
    if len(images) > spec.max_images:
        raise invalid("images of the record", len(images), f"<= max_images {spec.max_images}")


def _check_truncation(ids: list[int], mask: list[bool], image_id: int, length: int) -> None:
    """Raises UserError if truncation to `length` removes part of an image or all supervision."""
    if image_id in ids[length:]:
        raise UserError(
            f"tokens: expected all images within max_length {length}, got {len(ids)} tokens"
        )
    if not any(mask[:length]):
        raise UserError(
            f"tokens: expected an answer token within max_length {length}, got {len(ids)} tokens"
        )


def _padded(ids: list[int], mask: list[bool], pad_id: int, spec: ExampleSpec) -> Batch:
    tokens = np.full(spec.max_length, pad_id, np.int32)
    loss_mask = np.zeros(spec.max_length, bool)
    tokens[: len(ids)], loss_mask[: len(ids)] = ids, mask
    return padded_batch(tokens, np.int32(len(ids)), loss_mask)


def _read_images(paths: Sequence[str], spec: ExampleSpec) -> np.ndarray | None:
    """Returns uint8 [I, h, w, 3], with zeros in unused slots; None for a text-only model."""
    if not spec.image_tokens:
        return None
    images = np.zeros((spec.max_images, spec.image_size, spec.image_size, 3), np.uint8)
    for slot, path in enumerate(paths):
        images[slot] = preprocess(load_image(path), spec.image_size, spec.pad_color)
    return images
