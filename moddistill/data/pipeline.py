"""Record files to an endless stream of batches, in an order that depends on seed and index only.

Shuffling and mixing are functions of the index, processes take every n-th element, and rejected
records drop out after the workers, so workers never change the order, and a position, which is one
integer, is the same for any number of them. Hosts do not change the order either, but each fills
the place of a record rejected while it is made (an unreadable image, say) with its own next one.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from moddistill.config import DataConfig
from moddistill.data.examples import ExampleSpec, make_example, make_preference
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.data.records import read_conversations, read_preferences
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, at_field, nearest
from moddistill.models.batch import AnyBatch

LOG = logging.getLogger("moddistill")
KINDS = {
    "conversation": (read_conversations, make_example),
    "preference": (read_preferences, make_preference),
}
THREADS = 4  # decoding and resizing release the interpreter lock, little else does


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
    """Batches of `batch_size` samples for one process: a `Batch` for `kind` "conversation", a
    `PreferenceBatch` for "preference".

    The stream never ends. `get_state` and `set_state` of its iterator restore the exact next batch,
    with any number of workers. Rejected records are written to `quarantine_path`, which
    `Quarantine(quarantine_path).count` counts; truncated ones to `truncated.jsonl` next to it.

    Args:
      origin: the setting that `config.sources` comes from, for messages.

    Raises:
      UserError: an unknown kind, no source, a weight that is not positive, a source that cannot be
        read, images for a model without a vision encoder; and while iterating, a source of which
        every record is rejected.
    """
    if kind not in KINDS:
        hint = nearest(kind, KINDS)
        raise UserError(f"record kind {kind!r} is unknown; accepted: {', '.join(KINDS)}{hint}")
    if not config.sources:
        raise UserError(
            f"{origin} is empty; accepted: at least one source, such as --{origin}.NAME.path=FILE "
            f"--{origin}.NAME.images=FOLDER"
        )
    read, make = KINDS[kind]
    quarantine = Quarantine(quarantine_path)
    cut = Quarantine(str(Path(quarantine_path).with_name("truncated.jsonl")))
    streams, weights = [], []
    # Sorted, so that the order of records does not depend on the order of settings.
    for number, (name, source) in enumerate(sorted(config.sources.items())):
        where = f"{origin}.{name}"
        if not source.weight > 0:
            raise UserError(f"{where}.weight is {source.weight}; accepted: above 0")
        with at_field(where):
            records, rejected = read(source.path, source.images)
        _check_images(records, spec, where)
        if process_index == 0:
            quarantine.add(rejected)
            _warn(records, rejected, spec, where, quarantine_path)
        maker = _Maker(make, tokenizer, spec, quarantine, cut, len(records))
        # Every source has its own seed, or two of the same length would be shuffled alike.
        shuffled = grain.MapDataset.source(records).seed(seed + number).shuffle()
        streams.append(shuffled.repeat().map(maker))
        weights.append(source.weight)
    mixed = grain.MapDataset.mix(streams, weights)[process_index::process_count]
    samples = _Samples(mixed, config.workers, batch_size)
    # After the workers, because dropping records inside one would shift its turn.
    return samples.filter(_is_sample).batch(batch_size, drop_remainder=True)


def _check_images(records: Sequence[Any], spec: ExampleSpec, origin: str) -> None:
    """Raises UserError for records with images if the model has no vision encoder."""
    count = sum(bool(record.images) for record in records)
    if count and not spec.image_tokens:
        raise UserError(
            f"{origin}: {count} of {len(records)} records have images, but the model has no vision "
            "encoder; accepted: records without images, a student that has one, such as an import "
            "with --vision, or --config.vision=MODEL, which adds that model's"
        )


def _warn(
    records: Sequence[Any],
    rejected: Sequence[Rejected],
    spec: ExampleSpec,
    origin: str,
    quarantine_path: str,
) -> None:
    """Logs how many records of a source are known to be left out before any is made a sample."""
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
    """Samples, and None for rejected records, read by threads or worker processes."""

    def __init__(self, mixed: grain.MapDataset, workers: int, batch_size: int):
        super().__init__()
        self.mixed = mixed
        self.workers = workers
        self.batch_size = batch_size

    def __iter__(self) -> grain.DatasetIterator:
        return _SampleIterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """An iterator over the samples from `index` on."""
        buffer = 2 * max(self.batch_size, THREADS)
        samples = self.mixed[index:].to_iter_dataset(
            grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=buffer), allow_nones=True
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads absl flags when it starts workers; outside of absl.app they are
                # unparsed.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                self.workers, per_worker_buffer_size=self.batch_size
            )
            samples = samples.mp_prefetch(options)
        return iter(samples)


class _SampleIterator(grain.DatasetIterator):
    """Counts samples. Grain's own position is valid only for the same number of workers."""

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
class _Maker:
    """Makes the sample of a record, or None and a line in the quarantine."""

    make: Callable[..., tuple[AnyBatch, int]]
    tokenizer: Tokenizer
    spec: ExampleSpec
    quarantine: Quarantine
    cut: Quarantine
    records: int  # how many the source has
    rejected: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, record: Any) -> AnyBatch | None:
        if record.line in self.rejected:
            return None
        try:
            sample, length = self.make(record, self.tokenizer, self.spec)
        except ValueError as error:
            self.quarantine.add([Rejected(record.file, record.line, str(error))])
            self.rejected.add(record.line)
            if len(self.rejected) == self.records:
                raise UserError(
                    f"{record.file}: none of its {self.records} records can be used; "
                    f"see {self.quarantine.path} (the last one: {error})"
                ) from error
            return None
        if length > self.spec.max_length:
            reason = f"{length} tokens are truncated to {self.spec.max_length}"
            self.cut.add([Rejected(record.file, record.line, reason)])
        return sample


def _is_sample(sample: Any) -> bool:
    return sample is not None
