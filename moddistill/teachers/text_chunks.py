"""Alignment of two tokenizations of the same answers, by the bytes at which their tokens end.

    student   " " "4" "2" " cats" END      chunks   " " "4" ~ "4"   "2" = "2"   ...
    teacher   "4" "2" " cats" END

Chunks are the smallest groups of tokens that end at the same byte in both. Chunks of one token of
equal text have the same distribution to predict (=); of all others the likelihood can be compared
(~), and the distribution over classes of tokens that begin with one another (`token_classes`).
Templates differ in whether an answer begins with a space, which does not count.

References:
  ALM: https://arxiv.org/abs/2503.20083.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moddistill.data.token_texts import END
from moddistill.errors import UserError

_MOST_SHOWN = 40  # characters of an answer


class Chunk(NamedTuple):
    """Tokens `student` of one tokenization, and `teacher` of the other, that have the same text.

    Attributes:
      is_token: whether it is one token of equal text on both sides.
      begins_alike: whether both have read the same text before it, so that the distributions of
        what comes next are comparable.
    """

    student: range
    teacher: range
    is_token: bool
    begins_alike: bool


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Chunk]:
    """Returns the chunks of the texts of tokens, in their order.

    The last answer of a truncated sample is aligned as far as both have it.

    Raises:
      UserError: the answers differ.
    """
    answers = list(zip(_answers(student), _answers(teacher), strict=False))
    chunks = []
    for mine, other in answers:
        ours, theirs = student[mine.start : mine.stop], teacher[other.start : other.stop]
        for a, b in _align_answer(ours, theirs):
            is_token = len(a) == len(b) == 1 and ours[a.start] == theirs[b.start]
            text, other_text = ours[a.start : a.stop], theirs[b.start : b.stop]
            alike = b"".join(text) == b"".join(other_text)  # but for a space that is skipped
            chunks.append(Chunk(_moved(a, mine.start), _moved(b, other.start), is_token, alike))
    return chunks


def _moved(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


def _answers(texts: Sequence[bytes]) -> Iterator[range]:
    """Yields the tokens of each answer with its end; the last one may lack it."""
    start = 0
    for position, text in enumerate(texts):
        if text == END:
            yield range(start, position + 1)
            start = position + 1
    if start < len(texts):
        yield range(start, len(texts))


def _align_answer(
    student: Sequence[bytes], teacher: Sequence[bytes]
) -> Iterator[tuple[range, range]]:
    """Yields the tokens of each chunk of one answer, counted from its first one."""
    texts = b"".join(student), b"".join(teacher)
    skipped = _leading_spaces(*texts)
    a, b = (text[count:] for text, count in zip(texts, skipped, strict=True))
    # Only a truncated answer, which has no end, is the beginning of another.
    if not (a.startswith(b) or b.startswith(a)):
        raise UserError(f"answer: expected {_shown(a)} as the student reads it, got {_shown(b)}")
    ends = [
        np.cumsum([len(text) for text in side]) - count
        for side, count in zip((student, teacher), skipped, strict=True)
    ]
    starts = [0, 0]
    for end in np.intersect1d(*ends):
        stops = [int(np.searchsorted(each, end, side="right")) for each in ends]
        yield range(starts[0], stops[0]), range(starts[1], stops[1])
        starts = stops


def _leading_spaces(a: bytes, b: bytes) -> tuple[int, int]:
    """Returns how many bytes of each text precede the answer: a space that one of them has more."""
    spaces = [len(text) - len(text.lstrip(b" ")) for text in (a, b)]
    return int(spaces[0] > spaces[1]), int(spaces[1] > spaces[0])


def _shown(text: bytes) -> str:
    return repr(text.removesuffix(END).decode(errors="replace")[:_MOST_SHOWN])
