"""Classes of tokens of two vocabularies: what both tell of a text that comes next.

A teacher that writes " ci" ~ "rcle" where the student has " circle" says with " ci" how likely all
of the student's tokens are that begin so. Each token is joined to the first one that the other
vocabulary writes its text with, and tokens that are connected are one class:

    student   " circle" " cyan" " c"           " red" " rectangle"        " yes"
    teacher   " ci" " c" " co"                 " re"                      " yes"

The next token of both is in the same class if their texts are the same, so the probabilities of
classes are comparable wherever both read the same text before.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

_NO_RANK = 2**31 - 1


def token_classes(
    teacher: Sequence[bytes | None], student: Sequence[bytes | None]
) -> tuple[dict[int, int], np.ndarray]:
    """Returns the class of each text of the teacher's, and of each id of the student.

    A class is named by an id of the student; the teacher's ids whose class has none are left out.

    Args:
      teacher, student: the texts of ids; None of ids that are none.
    """
    theirs, ours = (
        {text: id for id, text in enumerate(side) if text} for side in (teacher, student)
    )
    # Nodes: the student's ids, and then the teacher's.
    parents = np.arange(len(student) + len(teacher))
    for text, id in ours.items():
        first = _first_token(text, theirs)
        if first is not None:
            _join(parents, id, len(student) + first)
    for text, id in theirs.items():
        first = _first_token(text, ours)
        if first is not None:
            _join(parents, len(student) + id, first)
    names: dict[int, int] = {}
    of_student = np.arange(len(student), dtype=np.int32)
    for id in ours.values():
        of_student[id] = names.setdefault(_root(parents, id), id)
    roots = {id: _root(parents, len(student) + id) for id in theirs.values()}
    return {id: names[root] for id, root in roots.items() if root in names}, of_student


def _first_token(text: bytes, ids: Mapping[bytes, int]) -> int | None:
    """The first token of a text, by merging the pair of the lowest id first; None without its byte.

    So do byte-level BPEs, whose ids are in the order of their merges.
    """
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        pairs = (a + b for a, b in itertools.pairwise(parts))
        rank, at = min((ids.get(pair, _NO_RANK), at) for at, pair in enumerate(pairs))
        if rank == _NO_RANK:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return ids.get(parts[0])


def _root(parents: np.ndarray, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = int(parents[node])
    return node


def _join(parents: np.ndarray, node: int, other: int) -> None:
    parents[_root(parents, node)] = _root(parents, other)
