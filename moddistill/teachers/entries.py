"""Targets of one record as bytes, the content of a teacher cache.

    magic `MDT2` | number n of supervised tokens, uint32 | arrays

Integers and floats are little-endian. Arrays of the n tokens, one after the other:

    label_logprobs  float32 [n]
    log_rest        float32 [n], of `top_k`
    labels          ids [n]: the tokens
    logprobs        float16 [n, K]
    ids             ids [n, K]

Ids are uint16, the low bits, and then the bits above these, packed. If K is the number of all ids,
there are no `ids`: `logprobs` are float32 in the order of the ids. With ids of 18 bits, a token
takes 4.25 K + 10.25 bytes.

Of a pair, n is 2: `label_logprobs` are the log-likelihoods of both answers, and a digest of their
text, 8 bytes, follows. A record without targets has n = 0, and the reason in place of arrays.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moddistill.config import CachedKind
from moddistill.errors import UserError
from moddistill.models.vocabulary import IdRanges, num_ids, token_mask

Array = Any  # of numpy in files, of jax in the program that makes them

_MAGIC = b"MDT2"
_HEAD = struct.Struct("<4sI")
_DIGEST = 8  # bytes
_LOW = 16  # bits of an id in an array of its own


class TokenTargets(NamedTuple):
    """What a teacher predicts at the n supervised tokens of a record; `answers` has n = 2 sums."""

    label_logprobs: Float[Array, "N"]
    labels: Int[Array, "N"] | None = None
    ids: Int[Array, "N K"] | None = None
    logprobs: Float[Array, "N K"] | None = None
    log_rest: Float[Array, "N"] | None = None


class Entry(NamedTuple):
    """The targets of a record, or the reason why it has none.

    Attributes:
      digest: of the text of a pair's answers; empty of other records.
    """

    targets: TokenTargets | None
    reason: str = ""
    digest: bytes = b""


def text_digest(*answers: Sequence[bytes]) -> bytes:
    """Returns 8 bytes that identify some answers, each as the texts of its tokens."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for tokens in answers:
        text = b"".join(tokens).strip()  # templates differ in the space before an answer
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.digest()


@dataclasses.dataclass(frozen=True)
class EntryFormat:
    """How entries of a cache are written.

    Attributes:
      kind: what they have of each token.
      ids: number K of ids of a token; 0 of `answers`.
      real_ids: ids of tokens that the teacher may predict.
    """

    kind: CachedKind
    ids: int
    real_ids: IdRanges

    @property
    def has_all_ids(self) -> bool:
        return self.kind == "top_k" and self.ids == num_ids(self.real_ids)

    @property
    def high_bits(self) -> int:
        """Bits of an id beyond the low ones."""
        return max(0, (self.real_ids[-1][1] - 1).bit_length() - _LOW)

    def bytes_of(self, tokens: int) -> int:
        """Returns the size of an entry of `tokens` supervised tokens."""
        size = _HEAD.size + 4 * tokens
        if self.kind == "answers":
            return size + _DIGEST
        size += 4 * tokens * (self.kind == "top_k") + self._bytes_of_ids(tokens)
        count = tokens * self.ids
        return size + (4 * count if self.has_all_ids else 2 * count + self._bytes_of_ids(count))

    def _bytes_of_ids(self, count: int) -> int:
        return 2 * count + -(-count * self.high_bits // 8)

    def pack(self, entry: Entry) -> bytes:
        """Returns the bytes of an entry."""
        targets = entry.targets
        if targets is None:
            return _HEAD.pack(_MAGIC, 0) + entry.reason.encode()
        parts = [_HEAD.pack(_MAGIC, len(targets.label_logprobs))]
        parts.append(targets.label_logprobs.astype("<f4").tobytes())
        if self.kind == "answers":
            return b"".join([*parts, entry.digest])
        if self.kind == "top_k":
            parts.append(targets.log_rest.astype("<f4").tobytes())
        parts.append(self._pack_ids(targets.labels))
        if self.has_all_ids:
            in_order = np.argsort(targets.ids, axis=1)
            logprobs = np.take_along_axis(targets.logprobs, in_order, axis=1)
            return b"".join([*parts, logprobs.astype("<f4").tobytes()])
        parts += [targets.logprobs.astype("<f2").tobytes(), self._pack_ids(targets.ids)]
        return b"".join(parts)

    def _pack_ids(self, ids: np.ndarray) -> bytes:
        ids = ids.reshape(-1)
        high = (ids[:, None] >> np.arange(_LOW, _LOW + self.high_bits)) & 1
        return ids.astype("<u2").tobytes() + np.packbits(high).tobytes()

    def unpack(self, data: bytes) -> Entry:
        """Returns the entry in some bytes; UserError for other bytes."""
        if len(data) < _HEAD.size or data[:4] != _MAGIC:
            raise UserError(f"targets: expected bytes that begin with {_MAGIC!r}, got {data[:4]!r}")
        _, count = _HEAD.unpack_from(data)
        if not count:
            return Entry(None, data[_HEAD.size :].decode(errors="replace"))
        if len(data) != self.bytes_of(count):
            raise UserError(f"targets: expected {self.bytes_of(count)} bytes, got {len(data)}")
        reader = _Reader(data, _HEAD.size)
        label_logprobs = reader.take("<f4", count)
        if self.kind == "answers":
            return Entry(TokenTargets(label_logprobs), digest=data[-_DIGEST:])
        return Entry(TokenTargets(label_logprobs, *self._arrays(reader, count)))

    def _arrays(self, reader: "_Reader", count: int) -> tuple[Any, ...]:
        """Returns labels, ids, logprobs and log_rest."""
        log_rest = reader.take("<f4", count) if self.kind == "top_k" else None
        labels = self._take_ids(reader, count)
        shape = (count, self.ids)
        if self.has_all_ids:
            logprobs = reader.take("<f4", count * self.ids).reshape(shape)
            ids = np.flatnonzero(token_mask(self.real_ids, self.real_ids[-1][1]))
            return labels, np.tile(ids, (count, 1)), logprobs, log_rest
        logprobs = reader.take("<f2", count * self.ids).astype(np.float32).reshape(shape)
        return labels, self._take_ids(reader, count * self.ids).reshape(shape), logprobs, log_rest

    def _take_ids(self, reader: "_Reader", count: int) -> np.ndarray:
        ids = reader.take("<u2", count).astype(np.int32)
        if self.high_bits:
            packed = reader.take("u1", -(-count * self.high_bits // 8))
            bits = np.unpackbits(packed, count=count * self.high_bits)
            powers = 1 << np.arange(_LOW, _LOW + self.high_bits, dtype=np.int32)
            ids += bits.reshape(-1, self.high_bits).astype(np.int32) @ powers
        return ids


class _Reader:
    """Arrays that follow each other in some bytes."""

    def __init__(self, data: bytes, start: int):
        self._data, self._at = data, start

    def take(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, dtype, count, self._at)
        self._at += found.nbytes
        return found
