"""A teacher cache: what a teacher predicts at the supervised tokens of records, in files.

    CACHE/cache.json                           what it is of (`Fingerprint`), and its format
    CACHE/vocabulary.json                      the texts of the teacher's tokens
    CACHE/SOURCE-00000-of-00012.array_record   entries of `SHARD_RECORDS` records, in their order
    CACHE/quarantine.jsonl, truncated.jsonl    records without targets, and those that were cut
    CACHE/digests.json                         SHA-256 of all files, written last

Every record of a source has an entry, also one that is left out. A shard is there when it is
complete.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.config import TrainConfig
from moddistill.data.array_records import ArrayRecordFile
from moddistill.data.sources import Source
from moddistill.data.token_texts import TokenTexts, read_token_texts
from moddistill.errors import UserError
from moddistill.models.batch import CacheShape
from moddistill.storage.digests import NAME, verify
from moddistill.storage.json_file import changed_values, read_json
from moddistill.teachers.entries import Entry, EntryFormat

CACHED = "cache:"  # before the folder in `config.teacher`
SETTINGS, VOCABULARY = "cache.json", "vocabulary.json"
SHARD_RECORDS = 4096  # which an interrupted extraction repeats at most, of each process
_DATA = ("max_length", "max_images", "max_pixels", "exif")  # of a fingerprint
_MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class SourceIdentity:
    """The records of a source.

    Attributes:
      records: their number, those that are left out included.
      content: digest of all its files, in their order.
      images: digest of some of its image files; empty without any.
      columns: fields of a table.
    """

    records: int
    content: str
    images: str
    columns: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What targets depend on, and a run that uses them has to share.

    Attributes:
      kind: of the records.
      data: settings of `data` by which records and images are read, or left out.
      temperature: that divided the teacher's logits.
    """

    kind: str
    data: Mapping[str, Any]
    temperature: float
    sources: Mapping[str, SourceIdentity]


@dataclasses.dataclass(frozen=True)
class TeacherIdentity:
    """How the teacher read the records.

    Attributes:
      spec: its name, for messages.
      digest: of its model folder, or the seed of new weights.
      tokenizer: digest of its tokenizer.
      template: conversation format.
      images: size, number of tokens and preprocessing of its images.
      compute: dtype and quantization of its layers.
    """

    spec: str
    digest: str
    tokenizer: str
    template: str
    images: Mapping[str, Any]
    compute: str


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The content of `cache.json`.

    Attributes:
      seed: of drawn ids.
    """

    format: EntryFormat
    seed: int
    teacher: TeacherIdentity
    fingerprint: Fingerprint


def read_settings(folder: Path) -> CacheSettings:
    """Reads `cache.json`; UserError if there is none, or another content."""
    fields = read_json(folder / SETTINGS)
    try:
        found = fields["format"]
        real_ids = tuple((int(a), int(b)) for a, b in found["real_ids"])
        fingerprint = dict(fields["fingerprint"])
        fingerprint["sources"] = {
            name: SourceIdentity(**source) for name, source in fingerprint["sources"].items()
        }
        return CacheSettings(
            EntryFormat(found["kind"], int(found["ids"]), real_ids),
            int(fields["seed"]),
            TeacherIdentity(**fields["teacher"]),
            Fingerprint(**fingerprint),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / SETTINGS}: expected the settings of a teacher cache, got {error!r}"
        ) from None


def shard_names(source: str, records: int) -> list[str]:
    """Returns the names of the shards of a source."""
    count = -(-records // SHARD_RECORDS)
    return [f"{source}-{number:05d}-of-{count:05d}.array_record" for number in range(count)]


def missing_records(folder: Path, settings: CacheSettings) -> list[str]:
    """Returns a line for each consecutive range of records that have no entries yet."""
    missing = []
    present = {path.name for path in folder.iterdir()}
    for name, source in settings.fingerprint.sources.items():
        absent = [x not in present for x in shard_names(name, source.records)]
        for first, last in _runs(absent):
            end = min((last + 1) * SHARD_RECORDS, source.records)
            missing.append(f"records {first * SHARD_RECORDS} to {end - 1} of {name}")
    return missing


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns the first and last index of each run of true flags."""
    runs: list[tuple[int, int]] = []
    for index, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        elif flag:
            runs.append((index, index))
    return runs


class TeacherCache:
    """A complete cache: `cache.entry(source, number)`; safe in threads and worker processes.

    Raises:
      UserError: the folder is not a cache, or entries are missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / SETTINGS).is_file():
            raise UserError(f"expected a folder that moddistill.extract made, got {str(folder)!r}")
        self.settings = read_settings(folder)
        missing = missing_records(folder, self.settings)
        if not missing and not (folder / NAME).is_file():
            missing = [NAME]
        if missing:
            raise UserError(
                f"{folder}: expected a finished cache, got one without "
                f"{_first_of(missing, ', ')}; the same moddistill.extract continues"
            )
        verify(folder, [SETTINGS, VOCABULARY])  # entries have checks of their own

    def __reduce__(self):
        return TeacherCache, (self.folder,)

    @property
    def shape(self) -> CacheShape:
        return CacheShape(self.settings.format.kind, self.settings.format.ids)

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """The teacher's vocabulary."""
        return read_token_texts(self.folder / VOCABULARY)

    @functools.cached_property
    def _files(self) -> dict[str, list[ArrayRecordFile]]:
        sources = self.settings.fingerprint.sources
        return {
            name: [
                ArrayRecordFile(str(self.folder / shard))
                for shard in shard_names(name, source.records)
            ]
            for name, source in sources.items()
        }

    def entry(self, source: str, number: int) -> Entry:
        """Returns the entry of a record; UserError if it is damaged."""
        shard, at = divmod(number, SHARD_RECORDS)
        file = self._files[source][shard]
        try:
            return self.settings.format.unpack(file.read_bytes(at))
        except UserError as error:
            raise UserError(f"{file.path}, entry {at}: {error}") from None


def fingerprint_of(config: TrainConfig, kind: str, sources: Mapping[str, Source]) -> Fingerprint:
    """Returns the fingerprint of a run.

    Args:
      kind: of the records.
      sources: by their names.
    """
    return Fingerprint(
        kind,
        {name: getattr(config.data, name) for name in _DATA},
        config.distillation.temperature,
        {name: _identity(source) for name, source in sources.items()},
    )


def _identity(source: Source) -> SourceIdentity:
    content = hashlib.sha256("\n".join(source.file_digests.values()).encode()).hexdigest()
    columns = dataclasses.asdict(source.config.columns)
    return SourceIdentity(source.total, content, source.images_digest, columns)


def check_fingerprint(cache: TeacherCache, run: Fingerprint, origin: str) -> None:
    """Raises UserError for a cache of other records, naming what differs.

    Args:
      run: that of the run, whose sources are some of the cache's.
    """
    made = cache.settings.fingerprint
    made = dataclasses.replace(
        made, sources={name: x for name, x in made.sources.items() if name in run.sources}
    )
    if different := describe_changes(*map(dataclasses.asdict, (made, run))):
        raise UserError(
            f"{origin}: expected a cache of this run's records, got {str(cache.folder)!r}, while "
            f"the run has {different}"
        )


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns how settings differ from those of a cache; an empty text if they do not."""
    changed = [
        f"{name} {new!r} instead of {old!r}"
        for name, (old, new) in sorted(changed_values(then, now).items())
    ]
    return _first_of(changed, "; ")


def _first_of(items: Sequence[str], separator: str) -> str:
    more = f" and {len(items) - _MOST_SHOWN} more" if len(items) > _MOST_SHOWN else ""
    return separator.join(items[:_MOST_SHOWN]) + more
