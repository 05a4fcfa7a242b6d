"""The experts of each token of a row: patches of the images, words of question and answer."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import num_batch_shards
from moddistill.inference.decode import without_drops
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import prompt_batch
from moddistill.models.batch import Batch
from moddistill.models.vlm import Vlm


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """Router probabilities of one row of tokens in each expert layer.

    Attributes:
      layers: indices of the expert layers in the decoder.
      top_k: experts that compute a token.
      token_ids: the row, the image id repeated once per patch.
      is_image: marks the patches.
      probs: softmax over all experts.
    """

    layers: tuple[int, ...]
    top_k: int
    token_ids: tuple[int, ...]
    is_image: Bool[np.ndarray, "T"]
    probs: Float[np.ndarray, "L T E"]

    @property
    def num_experts(self) -> int:
        return self.probs.shape[-1]

    @functools.cached_property
    def experts(self) -> Int[np.ndarray, "L T k"]:
        """The experts of each token, the most probable first."""
        # Stable, so that of equal experts the first one is chosen, as the router does.
        return np.argsort(-self.probs, axis=-1, kind="stable")[..., : self.top_k]

    @functools.cached_property
    def entropy(self) -> Float[np.ndarray, "L T"]:
        """Entropy of the router for each token in bits: 0 if it is certain, at most log2(E)."""
        logs = np.log2(np.maximum(self.probs, np.finfo(np.float32).tiny))
        return -np.sum(self.probs * logs, axis=-1)

    def load(self, layer: int, tokens: Bool[np.ndarray, "T"]) -> Float[np.ndarray, "E"]:
        """Returns each expert's share of the assignments of some tokens; they add up to 1.

        Args:
          layer: position in `layers`.
          tokens: marks those that count; zeros are returned if there is none.
        """
        chosen = self.experts[layer, tokens].reshape(-1)
        counts = np.bincount(chosen, minlength=self.num_experts)
        return counts / max(counts.sum(), 1)


def route(
    model: Vlm,
    params: dict[str, Any],
    token_ids: Sequence[int],
    images: np.ndarray | None,
    pad_id: int,
) -> Routing:
    """Returns the routing of a row of tokens, such as a prompt and its answer.

    It is that of the answer's own computation, in which experts drop nothing.

    Args:
      model: with at least one expert layer.
      images: preprocessed images of the row, [I, h, w, 3] uint8.
    """
    mesh = params_mesh(params)
    rows = num_batch_shards(mesh) if mesh else 1  # every batch shard needs one
    batch = prompt_batch([list(token_ids)] * rows, [images] * rows, pad_id)
    with mesh_context(mesh):
        probs = _token_probs(_recording(model), params, put_rows(mesh, batch))
    decoder = model.config.decoder
    ids = np.asarray(token_ids)
    return Routing(
        layers=decoder.moe_layers,
        top_k=decoder.moe.top_k,
        token_ids=tuple(token_ids),
        is_image=ids == model.config.image_token_id,
        probs=np.asarray(probs)[:, : len(ids)],
    )


def _recording(model: Vlm) -> Vlm:
    model = without_drops(model)
    return model.clone(compute=dataclasses.replace(model.compute, token_routing=True))


@functools.partial(jax.jit, static_argnames="model")
def _token_probs(model: Vlm, params: dict[str, Any], batch: Batch) -> Float[Array, "L T E"]:
    """Router probabilities of the first row in all expert layers."""
    probs = model.apply({"params": params}, batch).router.token_probs
    # [L, B * T, E]: the tokens of the first row come first. Replicated, to be read as one array.
    return nn.with_logical_constraint(probs[:, : batch.tokens.shape[1]], (None, None, None))


def same_experts(
    a: Routing, b: Routing, layer: int, choice: int, length: int
) -> Bool[np.ndarray, "N"]:
    """Marks those of the first `length` tokens whose expert of a choice two models share.

    Args:
      layer: position in the `layers` of both.
      choice: 0 for the most probable expert.
    """
    return a.experts[layer, :length, choice] == b.experts[layer, :length, choice]
