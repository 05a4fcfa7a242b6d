"""Record files to an endless stream of batches, in an order that depends on seed and index only.

Shuffling and mixing are functions of the index, processes take every n-th element, and rejected
records drop out behind the workers, so workers never change the order. Hosts do not either, but
each fills the place of a record rejected while it is made (an unreadable picture, say) with its
own next one.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
from absl import flags

from moddistill.config import DataConfig, nearest
from moddistill.data.examples import ExampleSpec, make_example, make_preference
from moddistill.data.records import Quarantine, Rejected, read_conversations, read_preferences
from moddistill.data.tokenizer import Tokenizer

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
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Batches of `batch_size` samples for one process: stacked arrays as `make_example` gives them
    (`kind` "conversation") or `make_preference` ("preference").

    The stream never ends. `get_state` and `set_state` of its iterator restore the exact next batch.
    What is left out stands in `quarantine_path`; `Quarantine(quarantine_path).count` counts it.
    Records whose text was cut stand in `cut.jsonl` beside it.

    Raises:
      ValueError: an unknown kind, no source, a weight that is not positive, a source that cannot be
        read; and while iterating, a source of which every record is rejected.
    """
    if kind not in KINDS:
        hint = nearest(kind, KINDS)
        raise ValueError(f"record kind {kind!r} is unknown; accepted: {', '.join(KINDS)}{hint}")
    if not config.sources:
        raise ValueError("data.sources is empty; at least one source is needed")
    read, make = KINDS[kind]
    quarantine = Quarantine(quarantine_path)
    cut = Quarantine(str(Path(quarantine_path).with_name("cut.jsonl")))
    streams, weights = [], []
    for number, (name, source) in enumerate(config.sources.items()):
        if not source.weight > 0:
            raise ValueError(f"data.sources.{name}.weight is {source.weight}; it must be positive")
        records, rejected = read(source.path, source.images)
        if process_index == 0:
            quarantine.add(rejected)
        maker = _Maker(make, tokenizer, spec, quarantine, cut, len(records))
        # Every source has its own seed, or two of the same length would be shuffled alike.
        shuffled = grain.MapDataset.source(records).seed(seed + number).shuffle()
        streams.append(shuffled.repeat().map(maker))
        weights.append(source.weight)
    mixed = grain.MapDataset.mix(streams, weights)[process_index::process_count]
    samples = mixed.to_iter_dataset(
        grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * max(batch_size, THREADS)),
        allow_nones=True,
    )
    if config.workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads absl flags when it starts workers; outside of absl.app nobody parsed them.
            flags.FLAGS.mark_as_parsed()
        samples = samples.mp_prefetch(
            grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=batch_size)
        )
    # Behind the workers, because dropping records inside one would shift its turn.
    return samples.filter(_is_sample).batch(batch_size, drop_remainder=True)


@dataclasses.dataclass
class _Maker:
    """Makes the sample of a record, or None and a line in the quarantine."""

    make: Callable[..., dict[str, Any]]
    tokenizer: Tokenizer
    spec: ExampleSpec
    quarantine: Quarantine
    cut: Quarantine
    records: int  # how many the source has
    rejected: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, record: Any) -> dict[str, Any] | None:
        if record.line in self.rejected:
            return None
        try:
            sample = self.make(record, self.tokenizer, self.spec)
        except ValueError as error:
            self.quarantine.add([Rejected(record.file, record.line, str(error))])
            self.rejected.add(record.line)
            if len(self.rejected) == self.records:
                raise ValueError(
                    f"{record.file}: none of its {self.records} records can be used; "
                    f"see {self.quarantine.path} (the last one: {error})"
                ) from error
            return None
        length = sample.pop("length", 0)
        if length > self.spec.max_length:
            reason = f"{length} tokens are cut to {self.spec.max_length}"
            self.cut.add([Rejected(record.file, record.line, reason)])
        return sample


def _is_sample(sample: Any) -> bool:
    return sample is not None
