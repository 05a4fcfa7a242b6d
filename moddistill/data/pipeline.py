"""Data pipeline: sources to an endless stream of batches, in a deterministic order.

1. The index of each source gives the lengths of its records, without their content (`index`).
2. Records are shuffled and mixed in windows (`order`), and each window is packed into rows
   (`packing`): row n of a run is a pure function of the seed and n.
3. Threads or worker processes read and decode the records of rows (`rows`).
4. Batch b has the rows from b * batch_size on; each process makes those of its devices.

So the position of a run is one integer, the next row, for any number of processes and workers. A
record that is only found to be bad when it is read is padding in its row, and shifts nothing.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moddistill.config import DataConfig
from moddistill.data.index import IndexSpec
from moddistill.data.order import Order
from moddistill.data.packing import RowPlan
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.data.reasons import Reasons
from moddistill.data.row_workers import RowWorkers
from moddistill.data.rows import MadeRow, RowMaker, RowSpec
from moddistill.data.sources import Limits, Source, WindowLengths
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, at_field, invalid
from moddistill.models.batch import AnyBatch

LOG = logging.getLogger("moddistill")
_THREADS = 4  # decoding and resizing of images release the GIL
_TOGETHER = 4  # rows that are made and sent at one time, at most
_MANY_ROWS = 2**62
_MOST_REASONS = 3


def open_sources(
    config: DataConfig, spec: RowSpec, tokenizer: Tokenizer, origin: str = "config.data.sources"
) -> list[Source]:
    """Opens the sources of a run, and makes the indices that are missing.

    Args:
      origin: setting of `config.sources`, for messages.

    Raises:
      UserError: no source, one that cannot be read, too many records that are left out, or images
        for a model without a vision encoder.
    """
    if not config.sources:
        raise UserError(
            f"{origin}: expected at least one source, such as --{origin}.NAME.path=FILE "
            f"--{origin}.NAME.images=FOLDER, got none"
        )
    limits = Limits(config.max_length, config.max_images)
    sources = []
    # Sorted, so that the order of records does not depend on the order of settings.
    for name, source in sorted(config.sources.items()):
        field = f"{origin}.{name}"
        index = IndexSpec(spec.kind, spec.template, spec.image_tokens, tokenizer, source.columns)
        with at_field(field):
            sources.append(Source(source, index, limits, field, config.index))
        _check_images(sources[-1], spec)
    return sources


def plan_rows(
    config: DataConfig, sources: Sequence[Source], seed: int, others: Sequence[Source] = ()
) -> RowPlan:
    """Returns the plan of the rows of a run.

    Args:
      others: the same sources as another reader of the rows has them. A sample has place for the
        longer of its two forms.

    Raises:
      UserError: the weights are so small that an epoch has no record.
    """
    weights = tuple(source.config.weight for source in sources)
    order = Order(tuple(map(len, sources)), weights, seed)
    if sum(order.uses) < 1:
        expected = "weights with at least one record in an epoch"
        raise invalid("config.data.sources", weights, expected)
    return RowPlan(order, WindowLengths(sources, others), config.max_length, config.packing)


def _check_images(source: Source, spec: RowSpec) -> None:
    """Raises UserError for records with images if the model has no vision encoder."""
    if source.with_images and not spec.image_tokens:
        raise UserError(
            f"{source.name}: expected records without images for a model without a vision encoder "
            "(one is added by --config.vision=MODEL, or by an import with --vision), got images in "
            f"{source.with_images} of {source.total} records"
        )


class Batches:
    """Iterator over this process's share of each batch; `next_row` is its position.

    Args:
      local_rows: numbers, within a batch, of the rows that this process makes.
      batch_size: rows of a batch, over all processes.
      workers: worker processes; 0 reads in threads.
      timeout: seconds without a row after which workers count as stopped.
      lists: folder of `quarantine.jsonl`, `truncated.jsonl` and `without_targets.jsonl`.
      max_rejected: share of a source's records that may be rejected, or without targets.

    Raises:
      UserError: while iterating, when more records than `max_rejected` turn out to be bad.
    """

    def __init__(
        self,
        maker: RowMaker,
        *,
        local_rows: Sequence[int],
        batch_size: int,
        workers: int,
        timeout: int,
        lists: Path,
        max_rejected: float,
    ):
        self.next_row = 0
        self._maker = maker
        self._local_rows = tuple(local_rows)
        self._batch_size = batch_size
        self._workers = workers
        self._timeout = timeout
        self._quarantine = Quarantine(str(lists / "quarantine.jsonl"))
        self._without_targets = Quarantine(str(lists / "without_targets.jsonl"))
        self._max_rejected = max_rejected
        self._rows: Any = None

    def __iter__(self) -> Iterator[AnyBatch]:
        return self

    def __next__(self) -> AnyBatch:
        if self._rows is None:
            self._rows = self._start()
        count = len(self._local_rows) // self._together
        rows = _combine([next(self._rows) for _ in range(count)], np.concatenate)
        self._list(rows.rejected, self._quarantine, "left out")
        self._list(rows.without_targets, self._without_targets, "without a teacher's targets")
        self.next_row += self._batch_size
        return rows.batch

    def seek(self, row: int) -> None:
        """Continues with the batch that begins at a row."""
        self.close()
        self.next_row = row

    def close(self) -> None:
        """Stops threads and workers."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    @property
    def _together(self) -> int:
        """Number of rows that are made together, a divisor of those of a batch."""
        return next(n for n in range(_TOGETHER, 0, -1) if len(self._local_rows) % n == 0)

    def _start(self) -> Any:
        """Returns an iterator over this process's rows, some together, from threads or workers."""
        self._maker.plan.row(self.next_row)  # so that workers need not plan all rows before it
        numbers = _RowNumbers(self.next_row, self._batch_size, self._local_rows)
        rows = grain.MapDataset.range(_MANY_ROWS).map(numbers).map(self._maker)
        rows = rows.batch(self._together, batch_fn=functools.partial(_combine, join=np.stack))
        # The next batch is made while a step computes.
        ahead = len(self._local_rows) // self._together
        if not self._workers:
            return iter(rows.to_iter_dataset(grain.ReadOptions(_THREADS, ahead + _THREADS)))
        return RowWorkers(rows.__getitem__, self._workers, ahead, self._timeout)

    def _list(self, found: Sequence[Rejected], lists: Quarantine, what: str) -> None:
        if not found:
            return
        lists.add(found)
        for source in self._maker.sources:
            count = sum(lists.counts[path] for path in source.file_digests)
            check_share(source, count, self._max_rejected, lists.path, found, what)


class _RowNumbers:
    """From the number of a local row, counted from a position on, to that of the row in the run."""

    def __init__(self, start: int, batch_size: int, local_rows: Sequence[int]):
        self.start, self.batch_size, self.local_rows = start, batch_size, local_rows

    def __call__(self, number: int) -> int:
        batch, row = divmod(number, len(self.local_rows))
        return self.start + batch * self.batch_size + self.local_rows[row]


def _combine(made: Sequence[MadeRow], join: Callable[..., np.ndarray]) -> MadeRow:
    """Returns several rows in one, with arrays that are stacked or concatenated."""
    batch = _combine_arrays([each.batch for each in made], join)
    lists = zip(*(each[1:] for each in made), strict=True)
    return MadeRow(batch, *(tuple(itertools.chain(*items)) for items in lists))


def _combine_arrays(items: Sequence[Any], join: Callable[..., np.ndarray]) -> Any:
    first = items[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        fields = zip(*items, strict=True)
        return type(first)(*(_combine_arrays(each, join) for each in fields))
    return join(items)


def list_left_out(sources: Sequence[Source], lists: Path) -> None:
    """Lists the records that their indices leave out or that are truncated, and logs how many."""
    quarantine = Quarantine(str(lists / "quarantine.jsonl"))
    truncated = Quarantine(str(lists / "truncated.jsonl"))
    for source in sources:
        quarantine.add(source.left_out())
        truncated.add(source.truncated())
        count = source.total - len(source)
        LOG.info("%s: %d of %d records are used", source.name, len(source), source.total)
        if count:
            LOG.warning(
                "%s: %d of %d records are left out (%s): %s",
                source.name,
                count,
                source.total,
                _common_reasons(source.left_out()),
                quarantine.path,
            )


def warn_of_slow_files(sources: Sequence[Source]) -> None:
    """Logs which sources have files that are slow to read in shuffled order."""
    for source in sources:
        if slow := source.slow_files:
            LOG.warning(
                "%s: %d files, such as %s, have row groups so large that shuffled reads are slow; "
                "python -m moddistill.prepare parquet converts them",
                source.name,
                len(slow),
                slow[0],
            )


def check_left_out(source: Source, limit: float, path: Path) -> None:
    """Raises UserError if a larger share than `limit` of a source's records is left out."""
    count = source.total - len(source)
    check_share(source, count, limit, path, source.left_out())


def check_share(
    source: Source,
    count: int,
    limit: float,
    path: Path | str,
    rejected: Iterable[Rejected],
    what: str = "left out",
) -> None:
    """Raises UserError if `count` is a larger share than `limit` of a source's records.

    Args:
      path: of the list of these records.
      rejected: some of them, for the message.
    """
    if count > limit * source.total:
        raise UserError(
            f"{source.name}: expected at most {limit:.1%} of {source.total} records to be {what} "
            f"(config.data.max_rejected), got {count}: {_common_reasons(rejected)}; see {path}"
        )


def _common_reasons(rejected: Iterable[Rejected]) -> str:
    """Returns the commonest reasons with their counts, each with an example."""
    reasons = Reasons()
    for item in rejected:
        reasons.add(item)
    return "; ".join(
        f"{found['count']} x {kind} (such as {found['example']})"
        for kind, found in reasons.commonest(_MOST_REASONS).items()
    )
