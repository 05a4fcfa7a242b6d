"""Roofline of answers: FLOPs of their programs, bytes that these must read, and the least time.

A program takes at least its FLOPs at the chip's peak, and at least as long as the bytes that it
must read at the bandwidth of the chip's memory (Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moddistill.config import Dtype
from moddistill.distributed.accelerators import Chip
from moddistill.distributed.sharding import unbox
from moddistill.errors import invalid
from moddistill.inference.batching import cache_bytes_per_row
from moddistill.inference.prompts import bucket
from moddistill.models.compute import ComputeConfig
from moddistill.models.flops import StepSize, forward_flops
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import cast_frozen, flatten, in_group, is_computed


class AnswerSize(NamedTuple):
    """Answers that are made together.

    Attributes:
      rows: answers.
      prompt_tokens: of each prompt, those of images included.
      images: of each prompt.
      new_tokens: of each answer.
    """

    rows: int
    prompt_tokens: int
    images: int
    new_tokens: int

    @property
    def slots(self) -> int:
        """Positions of a row of the cache."""
        return bucket(self.prompt_tokens + self.new_tokens)


def answer_size(
    config: ModelConfig, rows: int, text_tokens: int, images: int, new_tokens: int
) -> AnswerSize:
    """Returns the size of answers to prompts with images; UserError if the model sees none."""
    if images and config.vision is None:
        raise invalid("images", images, "0 for a model without a vision encoder")
    patches = images * config.vision.patches if images else 0
    return AnswerSize(rows, text_tokens + patches, images, new_tokens)


class Work(NamedTuple):
    """FLOPs of a program, and bytes that it cannot avoid reading."""

    flops: float
    bytes: float


def least_seconds(work: Work, chip: Chip) -> float:
    """Returns the time below which no program does this work on one JAX device of the chip."""
    return chip.devices * max(work.flops / chip.flops, work.bytes / chip.bandwidth)


def prefill_work(config: ModelConfig, size: AnswerSize, dtype: Dtype) -> Work:
    """Work of reading all prompts, and of the head at their last tokens.

    Activations and the cache, which is written, are not counted as bytes.
    """
    tokens = size.rows * size.prompt_tokens
    content = StepSize(tokens, tokens * size.prompt_tokens, size.rows * size.images, size.rows)
    read = _parameter_reads(config, tokens, dtype, has_images=size.images > 0)
    return Work(forward_flops(config, content), read)


def token_work(config: ModelConfig, size: AnswerSize, dtype: Dtype) -> Work:
    """Work of a step that makes a token in each row, in the middle of the answers."""
    # Step i of 1 to n - 1 has the keys of the prompt, of i - 1 tokens before, and of its own.
    context = size.prompt_tokens + size.new_tokens / 2
    content = StepSize(size.rows, size.rows * context, 0, size.rows)
    cache = context * cache_bytes_per_row(config.decoder, answer_compute(dtype), 1)
    read = _parameter_reads(config, size.rows, dtype, has_images=False) + size.rows * cache
    return Work(forward_flops(config, content), read)


def _parameter_reads(config: ModelConfig, tokens: int, dtype: Dtype, has_images: bool) -> float:
    """Bytes of the parameters that a forward pass of `tokens` tokens reads, each once."""
    moe, total = config.decoder.moe, 0.0
    for path, x in flatten(loaded_params(config, dtype)).items():
        used = 1.0
        if path.startswith(("vision/", "projector/")):
            used = float(has_images and is_computed(path))
        elif path == "decoder/embedding" and not config.decoder.tie_word_embeddings:
            used = min(1.0, tokens / x.shape[0])
        elif in_group(path, "experts"):
            used = experts_in_use(moe.num_experts, moe.top_k, tokens)
        total += used * num_bytes(x)
    return total


def experts_in_use(num_experts: int, top_k: int, tokens: int) -> float:
    """Returns the expected share of a layer's experts that any of some tokens is routed to.

    Tokens choose independently and all experts equally often. A single token uses `top_k`.
    """
    return 1 - (1 - top_k / num_experts) ** tokens


def loaded_params(config: ModelConfig, dtype: Dtype) -> Any:
    """Shapes of the parameters as they are loaded for answers, layers still stacked."""
    return jax.eval_shape(lambda: cast_frozen(_zeros(config), jnp.dtype(dtype)))


def _zeros(config: ModelConfig) -> Any:
    params = unbox(abstract_params(config))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def answer_compute(dtype: Dtype) -> ComputeConfig:
    """How answers are computed: each layer has arrays of its own."""
    return ComputeConfig(dtype=jnp.dtype(dtype), stacked=False)


def num_bytes(x: Any) -> int:
    """Returns the bytes of an array or of its shape."""
    return math.prod(x.shape) * x.dtype.itemsize
