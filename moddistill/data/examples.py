"""Samples from records: tokens and loss masks of a conversation, or of both sides of a pair."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moddistill.data.chat_template import Piece, prompt, render
from moddistill.data.records import IMAGE, AnyRecord, PreferencePair
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import invalid


class Side(NamedTuple):
    """Tokens int32 [n], with the image id repeated per patch, and loss mask bool [n]."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class TokenCounts(NamedTuple):
    """Lengths of a sample, of the longer side of a pair.

    Attributes:
      tokens: its number of tokens.
      needed: the shortest length to which it may be truncated: one that has all images and a
        supervised token. Pairs are never truncated, since a part of an answer has another
        probability.
    """

    tokens: int
    needed: int


def encode_sides(
    record: AnyRecord, template: str, tokenizer: Tokenizer, image_tokens: int
) -> list[Side]:
    """Returns the sample of a conversation, or the chosen and the rejected side of a pair.

    Only the last answer of a pair is supervised.

    Raises:
      UserError: the template cannot render the record.
    """
    sides = []
    for pieces in _render_sides(record, template):
        ids, mask = _encode(pieces, tokenizer, image_tokens)
        sides.append(Side(np.array(ids, np.int32), np.array(mask, bool)))
    return sides


def encode_prompt(
    template: str,
    turns: Sequence[tuple[str, str]],
    question: str,
    images_count: int,
    tokenizer: Tokenizer,
    image_tokens: int,
    system: str | None = None,
) -> list[int]:
    """Encodes a generation prompt, with the image id repeated per patch.

    Args:
      system: system prompt in place of the template's.

    Raises:
      UserError: the number of `<image>` is not that of the images, or there are images for a
        text-only model.
    """
    pieces = prompt(template, turns, question, system)
    placeholders = pieces.count(Piece(IMAGE, special=True))
    if placeholders != images_count:
        raise invalid(f"number of {IMAGE}", placeholders, f"{images_count}, one per image")
    if images_count and not image_tokens:
        raise invalid("images of the prompt", images_count, "none for a text-only model")
    return _encode(pieces, tokenizer, image_tokens)[0]


def count_tokens(
    record: AnyRecord, template: str, tokenizer: Tokenizer, image_tokens: int
) -> TokenCounts:
    """Returns the lengths of the sample of a record, those of `encode_sides`.

    Raises:
      UserError: the template cannot render the record.
    """
    is_pair = isinstance(record, PreferencePair)
    tokens, needed = 0, 0
    for side in _render_sides(record, template):
        total, last_image, supervised = 0, 0, None
        for piece in side:
            if piece.supervised and supervised is None:
                supervised = total + 1
            if not piece.special:
                total += tokenizer.count(piece.text)
            elif piece.text == IMAGE:
                last_image = total = total + image_tokens
            else:
                total += 1
        tokens = max(tokens, total)
        needed = max(needed, last_image, supervised or 0)
    return TokenCounts(tokens, tokens if is_pair else needed)


def _render_sides(record: AnyRecord, template: str) -> list[list[Piece]]:
    if not isinstance(record, PreferencePair):
        return [render(template, record.turns, record.system)]
    # The prompt is a prefix of the pieces; earlier answers in it are context, not supervised.
    context = prompt(template, record.history, record.question, record.system)
    sides = []
    for answer in (record.chosen, record.rejected):
        turns = (*record.history, (record.question, answer))
        pieces = render(template, turns, record.system)[len(context) :]
        sides.append([*(piece._replace(supervised=False) for piece in context), *pieces])
    return sides


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
