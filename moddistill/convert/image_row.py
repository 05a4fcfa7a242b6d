"""Padding of a vocabulary without an embedding row for `<image>`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from moddistill.convert.rules import MappedTensor
from moddistill.models.vlm import ModelConfig
from moddistill.storage.tensor import Checkpoint, Tensor

_MULTIPLE = 64  # of rows, the usual `pad_to_multiple_of` of `resize_token_embeddings`


@dataclasses.dataclass(frozen=True)
class PaddedRows(Tensor):
    """A tensor of the rows of `stored`, padded with zero rows to `shape`."""

    stored: Tensor | None = None

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        rows = self.stored.map(mode)
        zeros = np.zeros((self.shape[0] - len(rows), *self.shape[1:]), self.dtype)
        return np.concatenate([rows, zeros])

    def rows(self, part: slice) -> Tensor:
        # The slice may contain stored rows, padding, or both.
        start, stop, _ = part.indices(self.shape[0])
        last = self.stored.shape[0]
        stored = self.stored.rows(slice(min(start, last), min(stop, last)))
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), stored=stored)


def with_image_row(config: ModelConfig) -> ModelConfig:
    """Adds an embedding row for `<image>` to a multimodal architecture without one."""
    decoder = config.decoder
    if config.vision is None or config.image_token_id < decoder.vocab_size:
        return config
    rows = -(-(config.image_token_id + 1) // _MULTIPLE) * _MULTIPLE
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, vocab_size=rows))


def pad_rows(
    checkpoint: Checkpoint, mapped: Sequence[MappedTensor], rows: int
) -> Mapping[str, Tensor]:
    """Pads embedding and head of a checkpoint to the rows of the architecture.

    Args:
      rows: number of rows in the source's config; tensors with another number are unchanged.
    """
    padded = {}
    for target in mapped:
        tensor = checkpoint.get(target.name)
        is_table = target.slot.path in ("decoder/embedding", "decoder/head")
        if is_table and tensor is not None and tensor.shape[:1] == (rows,) != target.shape[:1]:
            fields = (
                tensor.file,
                tensor.offset,
                tensor.dtype,
                (target.shape[0], *tensor.shape[1:]),
            )
            padded[target.name] = PaddedRows(*fields, stored=tensor)
    return {**checkpoint, **padded}
