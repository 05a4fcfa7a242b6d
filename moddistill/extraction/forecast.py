"""The forecast of an extraction: how long it takes, and how large its cache becomes."""

import logging
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import encode_sides
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError
from moddistill.extraction.plan import ShardPlan
from moddistill.extraction.setup import JaxSetup, Setup
from moddistill.extraction.shards import stored_size
from moddistill.teachers.entries import Entry

LOG = logging.getLogger("moddistill")
_SAMPLED = 64  # records, from whose mean size that of the cache follows


def log_forecast(setup: JaxSetup, plan: ShardPlan, seconds: float) -> None:
    """Logs time and bytes of the rows of a plan, of which a batch takes some seconds."""
    if not is_main_process():
        return
    seconds *= -(-plan.starts[-1] // setup.rows)
    records = sum(shard.end - shard.first for shard in plan.shards)
    tokens, size = _means(setup, plan)
    _log(records, records * tokens, records * stored_size(size), seconds)


def log_forecast_of(
    entries: Sequence[Entry], seconds: float, share: float, records: int, setup: Setup
) -> None:
    """Logs time and bytes of records, from some entries which took seconds.

    Args:
      share: how many times as many tokens all records have.
    """
    known = [len(each.targets.label_logprobs) for each in entries if each.targets] or [0]
    tokens = sum(known) * share / max(records, 1)
    size = stored_size(setup.settings.format.bytes_of(round(tokens)))
    _log(records, records * tokens, records * size, seconds * share)


def _log(records: int, tokens: float, size: float, seconds: float) -> None:
    LOG.info(
        "extraction of %s records, %s tokens with targets, about %s MB; about %s",
        f"{records:,}",
        f"{round(tokens):,}",
        f"{size / 1e6:,.1f}",
        _duration(seconds),
    )


def _means(setup: JaxSetup, plan: ShardPlan) -> tuple[float, float]:
    """Returns the mean supervised tokens and bytes of a record, from some at even distances."""
    ends = np.cumsum([shard.end - shard.first for shard in plan.shards])
    counts = []
    for number in np.unique(np.linspace(0, ends[-1] - 1, _SAMPLED).astype(int)).tolist():
        at = int(np.searchsorted(ends, number, side="right"))
        shard = plan.shards[at]
        counts.append(_supervised(setup, shard.source, shard.end - int(ends[at]) + number))
    known = [count for count in counts if count] or [0]
    sizes = [setup.settings.format.bytes_of(count) for count in known]
    return float(np.mean(known)), float(np.mean(sizes))


def _supervised(setup: JaxSetup, source: int, record: int) -> int:
    """Returns the number of tokens with targets of a record; 0 if it cannot be read."""
    spec = setup.spec
    try:
        found = setup.sources[source][record]
        sides = encode_sides(found, spec.template, setup.tokenizer, spec.image_tokens)
    except UserError:
        return 0
    if spec.kind == "preference":
        return len(sides)
    return int(sum(side.loss_mask[1 : spec.max_length].sum() for side in sides))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
