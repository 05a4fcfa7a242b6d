"""Entries of a cache from the targets of a batch."""

from collections.abc import Sequence

import jax
import numpy as np

from moddistill.data.packing import Sample
from moddistill.extraction.program import Extracted
from moddistill.teachers.entries import Entry, EntryFormat, TokenTargets, text_digest

_UNREAD = "its record could not be read"


def entries_of(
    extracted: Extracted, row: int, samples: Sequence[Sample], format: EntryFormat
) -> list[Entry]:
    """Returns the entries of the samples of a row, in their order.

    Args:
      extracted: of a batch, on the host.
      row: its number in the batch.
    """
    sides = [row]
    if format.kind == "answers":  # of B rows, 2 B sides
        sides.append(row + len(extracted.predicted) // 2)
    entries, start = [], 0
    for sample in samples:
        spans = [(side, slice(start, start + sample.length)) for side in sides]
        entries.append(_entry(extracted, spans, format))
        start += sample.length
    return entries


def _entry(extracted: Extracted, spans: Sequence[tuple[int, slice]], format: EntryFormat) -> Entry:
    chosen = [np.flatnonzero(extracted.predicted[span]) + span[1].start for span in spans]
    if not all(map(len, chosen)):
        return Entry(bytes(8), None, _UNREAD)
    places = [(row, at) for (row, _), at in zip(spans, chosen, strict=True)]
    digest = text_digest(*(extracted.labels[place] for place in places))
    if format.kind == "answers":
        logprobs = extracted.targets.label_logprobs
        sums = [logprobs[place].sum(dtype=np.float64) for place in places]
        return Entry(digest, TokenTargets(np.array(sums, np.float32)))
    [place] = places
    return Entry(digest, jax.tree.map(lambda x: x[place], extracted.targets))
