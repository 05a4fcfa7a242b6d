"""Entries of a cache from the targets of a batch."""

from collections.abc import Sequence

import jax
import numpy as np

from moddistill.data.packing import Sample
from moddistill.extraction.program import Extracted
from moddistill.extraction.setup import Setup
from moddistill.teachers.entries import Entry, TokenTargets, text_digest

_UNREAD = "its record could not be read"


def entries_of(
    extracted: Extracted, row: int, samples: Sequence[Sample], setup: Setup
) -> list[Entry]:
    """Returns the entries of the samples of a row, in their order.

    Args:
      extracted: of a batch, on the host.
      row: its number in the batch.
    """
    sides = [row]
    if setup.settings.format.kind == "answers":  # of B rows, 2 B sides
        sides.append(row + len(extracted.predicted) // 2)
    entries, start = [], 0
    for sample in samples:
        spans = [(side, slice(start, start + sample.length)) for side in sides]
        entries.append(_entry(extracted, spans, setup))
        start += sample.length
    return entries


def _entry(extracted: Extracted, spans: Sequence[tuple[int, slice]], setup: Setup) -> Entry:
    chosen = [np.flatnonzero(extracted.predicted[span]) + span[1].start for span in spans]
    if not all(map(len, chosen)):
        return Entry(None, _UNREAD)
    places = [(row, at) for (row, _), at in zip(spans, chosen, strict=True)]
    labels = [extracted.labels[place] for place in places]
    if setup.settings.format.kind == "answers":
        logprobs = extracted.targets.label_logprobs
        sums = [logprobs[place].sum(dtype=np.float64) for place in places]
        digest = text_digest(*map(setup.texts.spell, labels))
        return Entry(TokenTargets(np.array(sums, np.float32)), digest=digest)
    [place] = places
    targets = jax.tree.map(lambda x: x[place], extracted.targets)
    return Entry(targets._replace(labels=labels[0]))
