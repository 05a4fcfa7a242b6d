"""Exports without the embedding rows that are no tokens.

Losses and decoding mask these rows, so no training ever lowered their logits. vLLM and SGLang
ignore the `suppress_tokens` that would mask them too.

1. Rows after the last token are cut, with that of `<image>` if the model has no vision tower.
2. A row among the tokens keeps its id. `<image>` needs one: `LlavaForConditionalGeneration` looks
   its embedding up before image features replace it. In the head, such a row becomes the mean of
   the V rows of tokens. Its logit is then the mean of theirs, which is below the largest one, and
   its probability is at most 1 / V, since exp(mean(x)) <= mean(exp(x)).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moddistill.convert.rules import MappedTensor, Transform
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import IdRanges, num_ids, token_mask
from moddistill.storage.safetensors import write
from moddistill.storage.tensor import Tensor

_BLOCK = 4096  # rows that are read together
_TABLES = ("decoder/embedding", "decoder/head")


def cut_rows(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the architecture with as few embedding rows as its tokens need.

    Raises:
      UserError: the tokenizer has tokens whose rows would be cut.
    """
    decoder = config.decoder
    rows = decoder.real_ids[-1][1]
    used = tokenizer.real_ids[-1][1]
    if used > rows:
        raise UserError(
            f"--vocabulary: expected padded, as the tokenizer has ids up to {used - 1}, and the "
            f"model was trained with ids up to {rows - 1} of its {decoder.vocab_size} rows, got cut"
        )
    if config.vision is not None:
        rows = max(rows, config.image_token_id + 1)
    decoder = dataclasses.replace(decoder, vocab_size=min(rows, decoder.vocab_size))
    return dataclasses.replace(config, decoder=decoder)


def cut_tables(mapped: Sequence[MappedTensor], rows: int) -> list[MappedTensor]:
    """Returns the tensors with embedding and head cut to their first rows."""
    cut = Transform(
        tensor_shape=lambda shape: (rows, *shape[1:]),
        to_param=lambda x, _: x,
        # The last block of a table has fewer rows than were read.
        to_tensor=lambda x, shape: x[: shape[0]],
        row_axis=0,
    )
    return [
        dataclasses.replace(tensor, transform=cut) if tensor.slot.path in _TABLES else tensor
        for tensor in mapped
    ]


def write_mean_rows(
    mapped: Sequence[MappedTensor], tensors: Mapping[str, Tensor], config: ModelConfig
) -> list[int]:
    """Replaces the rows of a written head that are no tokens by the mean of those that are.

    Returns:
      The replaced rows.
    """
    decoder = config.decoder
    others = np.flatnonzero(~token_mask(decoder.real_ids, decoder.vocab_size)).tolist()
    # A tied head is the embedding, in which these rows are never computed with.
    path = _TABLES[0] if decoder.tie_word_embeddings else _TABLES[1]
    for tensor in mapped:
        if others and tensor.slot.path == path:
            table = tensors[tensor.name]
            mean = _mean_row(table, decoder.real_ids)
            for row in others:
                write(table.rows(slice(row, row + 1)), mean, tensor.name)
    return others


def _mean_row(table: Tensor, real_ids: IdRanges) -> np.ndarray:
    """Returns the mean [1, D] of the rows of tokens, in float64."""
    total = np.zeros((1, table.shape[1]))
    for start, stop in real_ids:
        for first in range(start, stop, _BLOCK):
            rows = table.rows(slice(first, min(first + _BLOCK, stop))).read()
            total += np.sum(rows.astype(np.float32), axis=0, dtype=np.float64)
    return total / num_ids(real_ids)
