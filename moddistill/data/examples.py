"""Records to samples of one fixed shape.

T: max_length, I: max_images, h = w: image_size.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.conversation import Piece, prompt, render
from moddistill.data.images import PAD_COLOR, load_image, preprocess
from moddistill.data.records import IMAGE, PreferencePair, Record
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.batch import Batch, PreferenceBatch, num_tokens, padded_batch


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """The template and the fixed shapes; `image_tokens` is 0 for models without a tower."""

    template: str
    max_length: int
    max_images: int
    image_size: int
    image_tokens: int
    pad_color: tuple[int, int, int] = PAD_COLOR


def make_example(record: Record, tokenizer: Tokenizer, spec: ExampleSpec) -> tuple[Batch, int]:
    """One sample of a conversation, truncated to `max_length`, and its length before truncation.

    Raises:
      UserError: too many images, images beyond `max_length`, no supervised token within it, or
        an image file that cannot be decoded.
    """
    _check_images(record.images, spec)
    ids, mask = _encode(render(spec.template, record.turns), tokenizer, spec.image_tokens)
    if len(ids) > spec.max_length:
        _check_cut(ids, mask, tokenizer.image_id, spec.max_length)
    sample = _padded(ids[: spec.max_length], mask[: spec.max_length], tokenizer.pad_id, spec)
    return sample._replace(images=_read_images(record.images, spec)), len(ids)


def make_preference(
    pair: PreferencePair, tokenizer: Tokenizer, spec: ExampleSpec
) -> tuple[PreferenceBatch, int]:
    """Both sides of a pair, only the last answer supervised, and the length of the longer one.

    Raises:
      UserError: as `make_example`, and when a side is longer than `max_length`, because a cut
        answer has another probability.
    """
    _check_images(pair.images, spec)
    chosen = _preference_side(pair, pair.chosen, "chosen", tokenizer, spec)
    rejected = _preference_side(pair, pair.rejected, "rejected", tokenizer, spec)
    length = max(int(num_tokens(side)) for side in (chosen, rejected))
    return PreferenceBatch(chosen, rejected, _read_images(pair.images, spec)), length


def encode_prompt(
    template: str,
    turns: Sequence[tuple[str, str]],
    question: str,
    images_count: int,
    tokenizer: Tokenizer,
    image_tokens: int,
) -> list[int]:
    """Ids of a generation prompt, the image id repeated for every patch.

    Raises:
      UserError: `<image>` is not written once for every image, or there are images for a
        text-only model.
    """
    pieces = prompt(template, turns, question)
    written = pieces.count(Piece(IMAGE, special=True))
    if written != images_count:
        raise UserError(f"{IMAGE} is written {written} times, but there are {images_count} images")
    if images_count and not image_tokens:
        raise UserError(f"{images_count} images were given to a text-only model")
    return _encode(pieces, tokenizer, image_tokens)[0]


def _preference_side(
    pair: PreferencePair, answer: str, side: str, tokenizer: Tokenizer, spec: ExampleSpec
) -> Batch:
    pieces = render(spec.template, (*pair.history, (pair.question, answer)))
    before = len(prompt(spec.template, pair.history, pair.question))
    context = [piece._replace(supervised=False) for piece in pieces[:before]]
    ids, mask = _encode(context + pieces[before:], tokenizer, spec.image_tokens)
    if len(ids) > spec.max_length:
        raise UserError(f"the {side} side has {len(ids)} tokens; {spec.max_length} are allowed")
    return _padded(ids, mask, tokenizer.pad_id, spec)


def _encode(
    pieces: Sequence[Piece], tokenizer: Tokenizer, image_tokens: int
) -> tuple[list[int], list[bool]]:
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
        raise UserError(f"{len(images)} images in a record for a text-only model")
    if len(images) > spec.max_images:
        raise UserError(f"{len(images)} images; max_images is {spec.max_images}")


def _check_cut(ids: list[int], mask: list[bool], image_id: int, length: int) -> None:
    if image_id in ids[length:]:
        raise UserError(f"an image lies beyond max_length {length} ({len(ids)} tokens)")
    if not any(mask[:length]):
        raise UserError(f"no answer token within max_length {length} ({len(ids)} tokens)")


def _padded(ids: list[int], mask: list[bool], pad_id: int, spec: ExampleSpec) -> Batch:
    tokens = np.full(spec.max_length, pad_id, np.int32)
    loss_mask = np.zeros(spec.max_length, bool)
    tokens[: len(ids)], loss_mask[: len(ids)] = ids, mask
    return padded_batch(tokens, np.int32(len(ids)), loss_mask)


def _read_images(paths: Sequence[str], spec: ExampleSpec) -> np.ndarray | None:
    """Pixels [I, h, w, 3], zeros in unused slots; None for a text-only model."""
    if not spec.image_tokens:
        return None
    images = np.zeros((spec.max_images, spec.image_size, spec.image_size, 3), np.uint8)
    for slot, path in enumerate(paths):
        images[slot] = preprocess(load_image(path), spec.image_size, spec.pad_color)
    return images
