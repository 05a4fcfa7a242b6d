"""Targets of one record as bytes, the content of a teacher cache.

    magic `MDT1` | digest of the supervised tokens, 8 bytes | number n of them, uint32 | arrays

Integers and floats are little-endian. Arrays of the n tokens, one after the other, `label_logprobs`
of all kinds first:

    label_logprobs  float32 [n]; of a pair, n is 2: the log-likelihoods of both answers
    log_rest        float32 [n], of `top_k`
    logprobs        float16 [n, K]
    ids             uint16 [n, K], the low bits, and the bits above these, packed

If K is the number of all ids, there are no `ids`: `logprobs` are float32 in the order of the ids.
With ids of 18 bits, a token takes 4.25 K + 8 bytes. A record without targets has n = 0, and the
reason in place of arrays.
"""

import dataclasses
import hashlib
import struct
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moddistill.config import CachedKind
from moddistill.errors import UserError
from moddistill.models.vocabulary import IdRanges, num_ids, token_mask

Array = Any  # of numpy in files, of jax in the program that makes them

_MAGIC = b"MDT1"
_HEAD = struct.Struct("<4s8sI")
_LOW = 16  # bits of an id in an array of its own


class TokenTargets(NamedTuple):
    """What a teacher predicts at the n supervised tokens of a record; `answers` has n = 2 sums."""

    label_logprobs: Float[Array, "N"]
    ids: Int[Array, "N K"] | None = None
    logprobs: Float[Array, "N K"] | None = None
    log_rest: Float[Array, "N"] | None = None


class Entry(NamedTuple):
    """The targets of a record, or the reason why it has none."""

    digest: bytes
    targets: TokenTargets | None
    reason: str = ""


def text_digest(*supervised: np.ndarray) -> bytes:
    """Returns 8 bytes that identify the supervised tokens of a sample, or of both answers."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in supervised:
        digest.update(len(tokens).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(tokens, "<i4"))
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
        per_token = 4 + 4 * (self.kind == "top_k")
        size = _HEAD.size + tokens * per_token
        if self.has_all_ids:
            return size + 4 * tokens * self.ids
        count = tokens * self.ids
        return size + 4 * count + -(-count * self.high_bits // 8)

    def pack(self, entry: Entry) -> bytes:
        """Returns the bytes of an entry."""
        targets = entry.targets
        if targets is None:
            return _HEAD.pack(_MAGIC, entry.digest, 0) + entry.reason.encode()
        parts = [targets.label_logprobs.astype("<f4")]
        if self.kind == "top_k":
            parts.append(targets.log_rest.astype("<f4"))
        if self.has_all_ids:
            in_order = np.argsort(targets.ids, axis=1)
            parts.append(np.take_along_axis(targets.logprobs, in_order, axis=1).astype("<f4"))
        elif self.ids:
            ids = targets.ids.reshape(-1)
            high = (ids[:, None] >> np.arange(_LOW, _LOW + self.high_bits)) & 1
            parts += [targets.logprobs.astype("<f2"), ids.astype("<u2"), np.packbits(high)]
        head = _HEAD.pack(_MAGIC, entry.digest, len(targets.label_logprobs))
        return b"".join([head, *(part.tobytes() for part in parts)])

    def unpack(self, data: bytes) -> Entry:
        """Returns the entry in some bytes; UserError for other bytes."""
        if len(data) < _HEAD.size or data[:4] != _MAGIC:
            raise UserError(f"targets: expected bytes that begin with {_MAGIC!r}, got {data[:4]!r}")
        _, digest, count = _HEAD.unpack_from(data)
        if not count:
            return Entry(digest, None, data[_HEAD.size :].decode(errors="replace"))
        if len(data) != self.bytes_of(count):
            raise UserError(f"targets: expected {self.bytes_of(count)} bytes, got {len(data)}")
        return Entry(digest, self._arrays(_Reader(data, _HEAD.size), count))

    def _arrays(self, reader: "_Reader", count: int) -> TokenTargets:
        label_logprobs = reader.take("<f4", count)
        log_rest = reader.take("<f4", count) if self.kind == "top_k" else None
        if not self.ids:
            return TokenTargets(label_logprobs)
        shape = (count, self.ids)
        if self.has_all_ids:
            logprobs = reader.take("<f4", count * self.ids).reshape(shape)
            ids = np.flatnonzero(token_mask(self.real_ids, self.real_ids[-1][1]))
            return TokenTargets(label_logprobs, np.tile(ids, (count, 1)), logprobs, log_rest)
        logprobs = reader.take("<f2", count * self.ids).astype(np.float32)
        ids = reader.take("<u2", count * self.ids).astype(np.int32)
        if self.high_bits:
            bits = np.unpackbits(reader.rest(), count=len(ids) * self.high_bits)
            powers = 1 << np.arange(_LOW, _LOW + self.high_bits, dtype=np.int32)
            ids += bits.reshape(-1, self.high_bits).astype(np.int32) @ powers
        return TokenTargets(label_logprobs, ids.reshape(shape), logprobs.reshape(shape), log_rest)


class _Reader:
    """Arrays that follow each other in some bytes."""

    def __init__(self, data: bytes, start: int):
        self._data, self._at = data, start

    def take(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, dtype, count, self._at)
        self._at += found.nbytes
        return found

    def rest(self) -> np.ndarray:
        return np.frombuffer(self._data, np.uint8, offset=self._at)
