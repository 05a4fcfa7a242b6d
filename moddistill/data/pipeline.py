"""Data pipeline: record files to an endless stream of batches, in a deterministic order.

1. Each source is shuffled, repeated and mapped to samples; sources are mixed by weight. The order
   of this global stream is a pure function of (seed, index).
2. Process p of n reads elements p, p + n, p + 2 n ... of it (round-robin).
3. Threads or worker processes make the samples in this order; a rejected record becomes None.
4. Rejected records are dropped after the workers, so their number never changes the order, and the
   position of a process is one integer: the elements that it has read.

A record that is only rejected when its sample is made, such as one with an unreadable image, is
replaced by the next element of the same process, not of the global stream.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from moddistill.config import DataConfig, SourceConfig
from moddistill.data.examples import ExampleSpec, make_example, make_preference
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.data.records import read_conversations, read_preferences
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, at_field, invalid, not_one_of
from moddistill.models.batch import AnyBatch

LOG = logging.getLogger("moddistill")
KINDS = {
    "conversation": (read_conversations, make_example),
    "preference": (read_preferences, make_preference),
}
THREADS = 4  # per process; decoding and resizing of images release the GIL


def make_dataset(
    config: DataConfig,
    spec: ExampleSpec,
    tokenizer: Tokenizer,
    *,
    kind: str,
    batch_size: int,
    seed: int,
    quarantine_path: str,
    origin: str = "config.data.sources",
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Returns the endless dataset of one process.

    Its elements are a `Batch` for `kind` "conversation" and a `PreferenceBatch` for "preference".
    `get_state` and `set_state` of its iterator restore the exact next batch, with any number of
    workers. Rejected records are appended to the `Quarantine` at `quarantine_path`, truncated ones
    to `truncated.jsonl` next to it.

    Args:
      batch_size: samples per batch of this process.
      seed: of the order.
      origin: setting of `config.sources`, for messages.

    Raises:
      UserError: an unknown kind, no source, a weight that is not positive, a source that cannot be
        read, or images for a model without a vision encoder; while iterating, a source of which
        every record is rejected.
    """
    if kind not in KINDS:
        raise not_one_of("record kind", kind, KINDS)
    if not config.sources:
        raise UserError(
            f"{origin}: expected at least one source, such as --{origin}.NAME.path=FILE "
            f"--{origin}.NAME.images=FOLDER, got none"
        )
    read, make = KINDS[kind]
    quarantine = Quarantine(quarantine_path)
    truncated = Quarantine(str(Path(quarantine_path).with_name("truncated.jsonl")))
    streams, weights = [], []
    # Sorted, so that the order of records does not depend on the order of settings.
    for number, (name, source) in enumerate(sorted(config.sources.items())):
        records, rejected = _read_source(source, read, spec, f"{origin}.{name}")
        if process_index == 0:
            quarantine.add(rejected)
            _warn(records, rejected, spec, f"{origin}.{name}", quarantine_path)
        sampler = _Sampler(
            make=make,
            tokenizer=tokenizer,
            spec=spec,
            quarantine=quarantine,
            truncated=truncated,
            num_records=len(records),
        )
        # With one seed, two sources of the same length would have the same permutation.
        shuffled = grain.MapDataset.source(records).seed(seed + number).shuffle()
        streams.append(shuffled.repeat().map(sampler))
        weights.append(source.weight)
    mixed = grain.MapDataset.mix(streams, weights)[process_index::process_count]
    samples = _Samples(mixed, config.workers, batch_size)
    # Workers are read round-robin. A record dropped inside of one would shift all later elements.
    return samples.filter(_is_sample).batch(batch_size, drop_remainder=True)


def _read_source(
    source: SourceConfig, read: Callable[..., Any], spec: ExampleSpec, origin: str
) -> tuple[list[Any], list[Rejected]]:
    """Returns (records, rejected) of a source; UserError as `make_dataset`."""
    if not source.weight > 0:
        raise invalid(f"{origin}.weight", source.weight, "> 0")
    with at_field(origin):
        records, rejected = read(source.path, source.images)
    _check_images(records, spec, origin)
    return records, rejected


def _check_images(records: Sequence[Any], spec: ExampleSpec, origin: str) -> None:
    """Raises UserError for records with images if the model has no vision encoder."""
    count = sum(bool(record.images) for record in records)
    if count and not spec.image_tokens:
        raise UserError(
            f"{origin}: expected records without images for a model without a vision encoder (one "
            "is added by --config.vision=MODEL, or by an import with --vision), got images in "
            f"{count} of {len(records)} records"
        )


def _warn(
    records: Sequence[Any],
    rejected: Sequence[Rejected],
    spec: ExampleSpec,
    origin: str,
    quarantine_path: str,
) -> None:
    """Logs the numbers of records of a source that are left out, as known before iteration."""
    total = len(records) + len(rejected)
    if rejected:
        LOG.warning(
            "%s: %d of %d records break the format and are left out: %s",
            origin,
            len(rejected),
            total,
            quarantine_path,
        )
    many = sum(len(record.images) > spec.max_images for record in records)
    if many:
        LOG.warning(
            "%s: %d of %d records have more than %d images (config.data.max_images) and are left "
            "out",
            origin,
            many,
            total,
            spec.max_images,
        )


class _Samples(grain.IterDataset):
    """Dataset of samples, and None for rejected records, made by threads or worker processes."""

    def __init__(self, mixed: grain.MapDataset, workers: int, batch_size: int):
        super().__init__()
        self.mixed = mixed
        self.workers = workers
        self.batch_size = batch_size

    def __iter__(self) -> grain.DatasetIterator:
        return _SampleIterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """Returns an iterator over the samples from `index` on."""
        buffer = 2 * max(self.batch_size, THREADS)
        samples = self.mixed[index:].to_iter_dataset(
            grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=buffer), allow_nones=True
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads absl flags when it starts workers, which only absl.app has parsed.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                self.workers, per_worker_buffer_size=self.batch_size
            )
            samples = samples.mp_prefetch(options)
        return iter(samples)


class _SampleIterator(grain.DatasetIterator):
    """Iterator whose state is the number of samples read.

    The state of Grain's own iterator is only valid for the same number of workers.
    """

    def __init__(self, samples: _Samples):
        super().__init__()
        self._samples = samples
        self._next_index = 0
        self._iterator = samples.start(0)

    def __next__(self) -> AnyBatch | None:
        sample = next(self._iterator)
        self._next_index += 1
        return sample

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._iterator.close()
        self._next_index = state["next_index"]
        self._iterator = self._samples.start(self._next_index)

    def close(self) -> None:
        self._iterator.close()
        super().close()


@dataclasses.dataclass
class _Sampler:
    """Makes the sample of a record; None, and a line in the quarantine, for a rejected one.

    Attributes:
      make: `make_example` or `make_preference`.
      truncated: list of the records longer than `max_length`.
      num_records: of the source; an error is raised when all are rejected.
      rejected: lines of the rejected records, which are not tried again.
    """

    make: Callable[..., tuple[AnyBatch, int]]
    tokenizer: Tokenizer
    spec: ExampleSpec
    quarantine: Quarantine
    truncated: Quarantine
    num_records: int
    rejected: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, record: Any) -> AnyBatch | None:
        if record.line in self.rejected:
            return None
        try:
            sample, length = self.make(record, self.tokenizer, self.spec)
        except ValueError as error:
            self.quarantine.add([Rejected(record.file, record.line, str(error))])
            self.rejected.add(record.line)
            if len(self.rejected) == self.num_records:
                raise UserError(
                    f"{record.file}: expected usable records, got {self.num_records} rejected, "
                    f"see {self.quarantine.path} (the last one: {error})"
                ) from error
            return None
        if length > self.spec.max_length:
            reason = f"{length} tokens are truncated to {self.spec.max_length}"
            self.truncated.add([Rejected(record.file, record.line, reason)])
        return sample


def _is_sample(sample: Any) -> bool:
    return sample is not None
