"""A row for `<image>` in a vocabulary that has exactly one row for each token of its tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from moddistill.convert.rules import MappedTensor
from moddistill.models.vlm import ModelConfig
from moddistill.storage.tensor import Checkpoint, Tensor

_MULTIPLE = 64  # rows of an embedding, as `resize_token_embeddings` is commonly called


@dataclasses.dataclass(frozen=True)
class PaddedRows(Tensor):
    """The rows of `stored`, then zeros up to `shape`."""

    stored: Tensor | None = None

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        rows = self.stored.map(mode)
        zeros = np.zeros((self.shape[0] - len(rows), *self.shape[1:]), self.dtype)
        return np.concatenate([rows, zeros])

    def rows(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        last = self.stored.shape[0]
        stored = self.stored.rows(slice(min(start, last), min(stop, last)))
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), stored=stored)


def with_image_row(config: ModelConfig) -> ModelConfig:
    """The architecture with an embedding row for `<image>`, if it sees images and has none."""
    decoder = config.decoder
    if config.vision is None or config.image_token < decoder.vocab_size:
        return config
    rows = -(-(config.image_token + 1) // _MULTIPLE) * _MULTIPLE
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, vocab_size=rows))


def pad_rows(
    checkpoint: Checkpoint, pieces: Sequence[MappedTensor], rows: int
) -> Mapping[str, Tensor]:
    """The checkpoint with embedding and head padded to the rows that the architecture has.

    Args:
      rows: that the source's config states; tensors with another number are left as they are.
    """
    padded = {}
    for piece in pieces:
        tensor = checkpoint.get(piece.name)
        is_table = piece.slot.path in ("decoder/embedding", "decoder/head")
        if is_table and tensor is not None and tensor.shape[:1] == (rows,) != piece.shape[:1]:
            fields = (tensor.file, tensor.offset, tensor.dtype, (piece.shape[0], *tensor.shape[1:]))
            padded[piece.name] = PaddedRows(*fields, stored=tensor)
    return {**checkpoint, **padded}
