"""Sources of records: files behind their indices, and which of their records a run uses."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moddistill.config import SourceConfig
from moddistill.data.forms import parse_record
from moddistill.data.image_files import ImageFile, read_bytes
from moddistill.data.index import FileIndex, IndexSpec, open_index
from moddistill.data.order import Window
from moddistill.data.parquet_files import ParquetFile
from moddistill.data.quarantine import Rejected
from moddistill.data.record_files import RecordFile, find_files, open_file
from moddistill.data.records import AnyRecord, ImageRef
from moddistill.errors import UserError, invalid

_SAMPLED = 32  # records whose images identify an image folder
_LARGEST_IMAGE = 2**30  # bytes


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a row has place for: records beyond it are left out, or truncated."""

    max_length: int
    max_images: int


@dataclasses.dataclass(frozen=True)
class _File:
    """A file and the numbers of its usable records; None if it uses all."""

    file: RecordFile
    index: FileIndex
    usable: np.ndarray | None

    def __len__(self) -> int:
        return len(self.index) if self.usable is None else len(self.usable)

    def take(self, column: np.ndarray) -> np.ndarray:
        """Returns a column of the index for the usable records."""
        return column if self.usable is None else column[self.usable]

    def numbers(self, records: Any) -> Any:
        """Returns numbers in the index of usable records."""
        return records if self.usable is None else self.usable[records]


class Source:
    """The usable records of the files of a source: `len`, `[number]` and `lengths`.

    Args:
      name: setting of the source, for messages.
      indices: folder of the indices; empty for one next to each file.

    Raises:
      UserError: a file is missing or not one of records, its index cannot be written, or there is
        no usable record.
    """

    def __init__(
        self, config: SourceConfig, spec: IndexSpec, limits: Limits, name: str, indices: str = ""
    ):
        self.config, self.spec, self.limits, self.name = config, spec, limits, name
        check_source(config)
        files = find_files(config.path)
        self._files = [self._open(file, open_index(file, spec, indices)) for file in files]
        # Files one after the other: record r is in the last file that starts at r or before.
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])
        self._before = np.cumsum([0, *(len(file.index) for file in self._files)])
        self.total = int(self._before[-1])
        if not len(self):
            raise self._without_records()
        if config.columns.image and not self.with_images:
            expected = "a field with images, which no record has"
            raise invalid("columns.image", config.columns.image, expected)

    def _open(self, path: str, index: FileIndex) -> _File:
        if index.first_named and not os.path.isdir(self.config.images):
            raise invalid(
                f"image folder of {path}",
                self.config.images,
                f"an existing folder, since record {index.first_named} has an image",
            )
        usable = (index.tokens > 0) & (index.needed <= self.limits.max_length)
        usable &= index.images <= self.limits.max_images
        numbers = None if usable.all() else np.flatnonzero(usable).astype(np.uint32)
        return _File(open_file(path), index, numbers)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> AnyRecord:
        """Returns a record; UserError if it can no longer be read as in the index."""
        return self._read(*self._locate(number))

    def _read(self, file: _File, at: int) -> AnyRecord:
        places = file.index.places
        try:
            fields = file.file.read(int(places.offset[at]), int(places.size[at]))
        except OSError as error:
            raise UserError(f"record: expected a readable file, got {error.strerror}") from error
        return parse_record(
            fields,
            kind=self.spec.kind,
            file=file.file.path,
            line=int(places.line[at]),
            image_root=self.config.images,
            columns=self.config.columns,
        )

    def place(self, number: int) -> tuple[str, int]:
        """Returns the file and the line of a record."""
        file, at = self._locate(number)
        return file.file.path, int(file.index.places.line[at])

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the numbers of usable records among all `total` ones, in the order of files."""
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        found = np.zeros(len(numbers), np.int64)
        for each in np.unique(which).tolist():
            at, file = which == each, self._files[each]
            found[at] = file.numbers(numbers[at] - self._starts[each]) + self._before[each]
        return found

    def _locate(self, number: int) -> tuple[_File, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        file = self._files[which]
        return file, int(file.numbers(number - int(self._starts[which])))

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the tokens of samples, int64, truncated to `max_length`."""
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        lengths = np.zeros(len(numbers), np.int64)
        for each in np.unique(which).tolist():
            at, file = which == each, self._files[each]
            lengths[at] = file.index.tokens[file.numbers(numbers[at] - self._starts[each])]
        return np.minimum(lengths, self.limits.max_length)

    def lengths_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns the tokens of samples by their numbers among all `total` ones, int64; truncated
        to `max_length`, and 0 of records without a sample."""
        which = np.searchsorted(self._before, positions, side="right") - 1
        lengths = np.zeros(len(positions), np.int64)
        for each in np.unique(which).tolist():
            at = which == each
            lengths[at] = self._files[each].index.tokens[positions[at] - self._before[each]]
        return np.minimum(lengths, self.limits.max_length)

    def images(self, number: int) -> int:
        """Returns the number of images of a record."""
        file, at = self._locate(number)
        return int(file.index.images[at])

    @property
    def most_images(self) -> int:
        """The largest number of images of a usable record."""
        return max(int(np.max(file.take(file.index.images), initial=0)) for file in self._files)

    @property
    def most_images_of_rows(self) -> int:
        """The largest number of images of `max_length` tokens of usable records."""
        length, largest = self.limits.max_length, 0
        for file in self._files:
            tokens = np.minimum(file.take(file.index.tokens), length)
            images = file.take(file.index.images).astype(np.int64)
            # In integers: a quotient in floats may be below that of a row which is full.
            largest = max(largest, int(np.max(length * images // tokens, initial=0)))
        return largest

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the content of the files by their paths, and of some of their images."""
        found = self.file_digests
        if images := self.images_digest:
            found[f"images of {self.config.path}"] = images
        return found

    @property
    def file_digests(self) -> dict[str, str]:
        """Digests of the content of the files, by their paths."""
        return {file.file.path: file.index.digest for file in self._files}

    @property
    def images_digest(self) -> str:
        """A digest of the image files of a few records, spread evenly; of all, it takes hours.

        These may be records that are not usable, so that teacher and student, which have place for
        different ones, have the same digest. Empty if no record names an image file.
        """
        if not any(file.index.first_named for file in self._files):
            return ""
        digest = hashlib.sha256()
        for number in np.unique(np.linspace(0, self.total - 1, _SAMPLED).astype(int)).tolist():
            which = int(np.searchsorted(self._before, number, side="right")) - 1
            with contextlib.suppress(UserError):  # a bad record is left out when it is read
                record = self._read(self._files[which], number - int(self._before[which]))
                for image in record.images:
                    digest.update(_file_digest(image))
        return digest.hexdigest()

    @property
    def slow_files(self) -> list[str]:
        """Files that are slow to read in shuffled order."""
        files = [each.file for each in self._files]
        return [x.path for x in files if isinstance(x, ParquetFile) and x.is_slow_to_shuffle()]

    @property
    def with_images(self) -> int:
        """Number of records with images."""
        return sum(int(np.count_nonzero(file.index.images)) for file in self._files)

    def left_out(self) -> Iterator[Rejected]:
        """Yields the records that are not usable, each with its reason."""
        for file in self._files:
            path, index, limits = file.file.path, file.index, self.limits
            for line, reason in index.rejected():
                yield Rejected(path, line, reason)
            for images in np.flatnonzero(index.images > limits.max_images).tolist():
                expected = f"<= data.max_images {limits.max_images}"
                error = invalid("images of the record", int(index.images[images]), expected)
                yield Rejected(path, int(index.places.line[images]), str(error))
            fits = index.images <= limits.max_images
            for number in np.flatnonzero(fits & (index.needed > limits.max_length)).tolist():
                reason = (
                    f"tokens: expected all images and an answer token within data.max_length "
                    f"{limits.max_length}, got {index.tokens[number]} tokens of which the first "
                    f"{index.needed[number]} are needed"
                )
                yield Rejected(path, int(index.places.line[number]), reason)

    def truncated(self) -> Iterator[Rejected]:
        """Yields the usable records that are longer than `max_length`."""
        for file in self._files:
            index, length = file.index, self.limits.max_length
            long = (index.tokens > length) & (index.needed <= length)
            for number in np.flatnonzero(long & (index.images <= self.limits.max_images)).tolist():
                reason = f"{index.tokens[number]} tokens are truncated to {length}"
                yield Rejected(file.file.path, int(index.places.line[number]), reason)

    def _without_records(self) -> UserError:
        first = next(self.left_out(), None)
        if first is None:
            return UserError(f"{self.config.path}: expected a record, got none")
        return UserError(
            f"{self.config.path}: expected a usable record, got {self.total} that are left out, "
            f"such as record {first.line} of {first.file}: {first.reason}"
        )


class WindowLengths:
    """Lengths of the samples of a window of the order; of the longer ones of two forms.

    Args:
      others: the same sources as another reader of the rows has them, or none.
    """

    def __init__(self, sources: Sequence[Source], others: Sequence[Source] = ()):
        self.sources, self.others = sources, others

    def __call__(self, window: Window) -> np.ndarray:
        lengths = np.zeros(len(window.record), np.int64)
        for number, source in enumerate(self.sources):
            at = window.source == number
            records = window.record[at]
            lengths[at] = source.lengths(records)
            if self.others:
                of_other = self.others[number].lengths_at(source.positions(records))
                lengths[at] = np.maximum(lengths[at], of_other)
        return lengths


def _file_digest(image: ImageRef) -> bytes:
    """The digest of an image file; of no bytes for one in the records, whose digest covers it."""
    if not isinstance(image, ImageFile):
        return b""
    try:
        return hashlib.sha256(read_bytes(image, _LARGEST_IMAGE)).digest()
    except UserError:  # missing; found when the record is read
        return b"none"


def check_source(config: SourceConfig) -> None:
    """Raises UserError for a missing file, an image folder that is none, or half a table."""
    find_files(config.path)
    columns = config.columns
    if bool(columns.question) != bool(columns.answer):
        raise invalid(
            "columns", dataclasses.asdict(columns), "both question and answer, or neither"
        )
    if config.images and not os.path.isdir(config.images):
        raise invalid(f"image folder of {config.path}", config.images, "an existing folder")
