"""Operations that `benchmarks.device` checks, each with a plain form of the same mathematics.

Plain forms hold all logits and full attention matrices at once, and loop over experts in Python.
Inputs are float32 numbers that bfloat16 represents exactly. Both dtypes thus share one reference,
and the router sees the same ties in both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from moddistill.config import PREFERENCE_KINDS, ExpertConfig
from moddistill.losses.chunked import LogitInputs, chunked_token_loss
from moddistill.losses.divergences import cross_entropy, divergence
from moddistill.losses.preference import preference_losses
from moddistill.models import attention_kernels
from moddistill.models.compute import ComputeConfig
from moddistill.models.logits import masked_logits
from moddistill.models.moe.layer import MoE, check_moe
from moddistill.teachers.targets import Targets

Arrays = dict[str, Any]


class Operation(NamedTuple):
    """Two forms of one operation, and their inputs.

    Attributes:
      ours: `(inputs, constants, dtype)` to one array, by the library.
      plain: `(inputs, constants)` to the same array, in float32.
      inputs: arrays with gradients.
      constants: arrays without gradients.
      dtypes: dtypes in which `ours` computes.
    """

    name: str
    ours: Callable[[Arrays, Arrays, Any], Array]
    plain: Callable[[Arrays, Arrays], Array]
    inputs: Arrays
    constants: Arrays
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def operations(tiny: bool) -> list[Operation]:
    """Returns all operations, at the sizes of real models unless `tiny`."""
    decoder, vision = ((2, 24, 4, 2, 8), (2, 25, 4, 4, 8)) if tiny else _ATTENTION
    experts = (64, 16, 32) if tiny else (1024, 512, 1408)
    token = (96, 32, 48, 300) if tiny else (1024, 2048, 4096, 16_000)
    return [
        token_losses(*token),
        pair_losses(),
        decoder_attention("one segment", *decoder),
        decoder_attention("packed", *decoder),
        cached_attention(*decoder),
        vision_attention(*vision),
        expert_layer("dropless", *experts),
        expert_layer("capacity", *experts),
    ]


_ATTENTION = ((2, 1024, 16, 4, 128), (2, 577, 16, 16, 64))


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    drawn = scale * rng.standard_normal(shape, np.float32)
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float32)


def token_losses(positions: int, width: int, teacher_width: int, real: int) -> Operation:
    """Returns KL and cross entropy in chunks; the vocabularies differ in their padding."""
    rng = np.random.default_rng(0)
    inputs = {
        "hidden": _normal(rng, positions, width),
        "head": _normal(rng, real + 10, width, scale=width**-0.5),
    }
    supervised = np.arange(positions) % 4 == 0
    constants = {
        "teacher_hidden": _normal(rng, positions, teacher_width),
        "teacher_head": _normal(rng, real + 20, teacher_width, scale=teacher_width**-0.5),
        "labels": rng.integers(0, real, positions).astype(np.int32),
        "kd": supervised * rng.uniform(0.5, 1.0, positions).astype(np.float32),
        "ce": supervised * rng.uniform(0.5, 1.0, positions).astype(np.float32),
    }

    real_ids = ((0, real),)

    def token_fn(logits: Array, targets: Targets, labels: Array) -> dict[str, Array]:
        teacher_logits = masked_logits(targets.per_position, targets.shared, real_ids)
        kd = divergence(logits, teacher_logits[:, : logits.shape[1]])
        return {"kd": kd, "ce": cross_entropy(logits, labels)}

    def ours(inputs: Arrays, constants: Arrays, dtype: Any) -> Array:
        arrays = inputs | constants
        names = ("hidden", "head", "teacher_hidden", "teacher_head")
        hidden, head, *teacher = (arrays[name].astype(dtype) for name in names)
        weights = {name: constants[name] for name in ("kd", "ce")}
        chunk = positions // 16 + 1  # the last of several chunks is not full
        labels = constants["labels"]
        return chunked_token_loss(
            token_fn,
            LogitInputs(hidden, head),
            labels,
            weights,
            Targets(*teacher),
            chunk_size=chunk,
            real_ids=real_ids,
        )[0]

    def plain(inputs: Arrays, constants: Arrays) -> Array:
        student = jax.nn.log_softmax((inputs["hidden"] @ inputs["head"].T)[:, :real])
        logits = constants["teacher_hidden"] @ constants["teacher_head"].T
        teacher = jax.nn.log_softmax(logits[:, :real])
        kd = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        ce = -jnp.sum(jax.nn.one_hot(constants["labels"], real) * student, axis=-1)
        return jnp.sum(constants["kd"] * kd + constants["ce"] * ce)

    return Operation("KL and cross entropy", ours, plain, inputs, constants)


def pair_losses(pairs: int = 16, beta: float = 0.5, smoothing: float = 0.1) -> Operation:
    """Returns all losses of the preference stage, in float32 as in training."""
    rng = np.random.default_rng(1)
    inputs = {name: _normal(rng, pairs, scale=3.0) for name in ("chosen", "rejected")}

    def ours(inputs: Arrays, _: Arrays, dtype: Any) -> Array:
        answers = (inputs[name].astype(dtype) for name in ("chosen", "rejected"))
        chosen, rejected = answers
        is_pair = jnp.ones(pairs, bool)
        losses = [
            preference_losses(chosen, rejected, is_pair, kind, beta, smoothing)
            for kind in PREFERENCE_KINDS
        ]
        return jnp.stack(losses)

    def plain(inputs: Arrays, _: Arrays) -> Array:
        chosen, rejected = inputs["chosen"], inputs["rejected"]
        margin = chosen - rejected

        def log_loss(x: Array) -> Array:
            return jnp.log(1 + jnp.exp(-beta * x))

        kl = [jnp.maximum(x.mean(), 0) for x in map(jax.lax.stop_gradient, (chosen, rejected))]
        keep = 1 / (1 + jnp.exp(beta * (chosen - kl[1])))
        avoid = 1 / (1 + jnp.exp(beta * (kl[0] - rejected)))
        losses = {
            "sigmoid": (1 - smoothing) * log_loss(margin) + smoothing * log_loss(-margin),
            "hinge": jnp.where(beta * margin < 1, 1 - beta * margin, 0.0),
            "ipo": (margin - 0.5 / beta) ** 2,
            "kto_pair": 0.5 * keep + 0.5 * avoid,
        }
        return jnp.stack([losses[kind] for kind in PREFERENCE_KINDS])

    return Operation("preference losses", ours, plain, inputs, {}, dtypes=("float32",))


def decoder_attention(
    rows: str, batch: int, length: int, heads: int, kv_heads: int, width: int
) -> Operation:
    """Returns causal grouped-query attention at positions that are not padding.

    Args:
      rows: `one segment`, as the data pipeline makes them, or `packed`.
    """
    segments = np.ones((batch, length), np.int32)
    segments[0, length * 3 // 4 :] = 0
    if rows == "packed":
        segments[:, length // 3 :] *= 2
    visible = segments[:, :, None] == segments[:, None]
    visible &= np.tri(length, dtype=bool) & (segments > 0)[:, None]
    visible |= np.eye(length, dtype=bool)  # keeps the softmax of padding finite

    def ours(inputs: Arrays, constants: Arrays, dtype: Any) -> Array:
        structure = attention_kernels.causal(constants["segments"], rows == "one segment")
        mixed = attention_kernels.attend(*_heads(inputs, dtype), structure)
        return _without_padding(mixed.astype(jnp.float32), constants)

    def plain(inputs: Arrays, constants: Arrays) -> Array:
        return _without_padding(_plain_attention(inputs, constants), constants)

    inputs = _attention_inputs(batch, length, heads, kv_heads, width)
    constants = {"segments": segments, "visible": visible}
    return Operation(f"attention of the decoder, {rows}", ours, plain, inputs, constants)


def cached_attention(batch: int, length: int, heads: int, kv_heads: int, width: int) -> Operation:
    """Returns attention of one query per row to the filled slots of a cache."""
    lengths = np.linspace(length // 2, length - 2, batch).astype(np.int32)
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    segments[:, -2] = 1  # the slot of the query; the last one is empty
    constants = {"segments": segments, "visible": segments[:, None] > 0}

    def ours(inputs: Arrays, constants: Arrays, dtype: Any) -> Array:
        segments, slot = constants["segments"], jnp.int32(length - 2)
        structure = attention_kernels.Structure(segments[:, -2:-1], segments, slot)
        mixed = attention_kernels.attend(*_heads(inputs, dtype), structure)
        return mixed.astype(jnp.float32)

    inputs = _attention_inputs(batch, length, heads, kv_heads, width)
    inputs["query"] = inputs["query"][:, :1]
    return Operation("attention of decoding", ours, _plain_attention, inputs, constants)


def _without_padding(mixed: Array, constants: Arrays) -> Array:
    return jnp.where((constants["segments"] > 0)[:, :, None, None], mixed, 0.0)


def vision_attention(batch: int, length: int, heads: int, kv_heads: int, width: int) -> Operation:
    """Returns full attention over an odd number of positions."""

    def ours(inputs: Arrays, _: Arrays, dtype: Any) -> Array:
        return attention_kernels.attend(*_heads(inputs, dtype), None).astype(jnp.float32)

    inputs = _attention_inputs(batch, length, heads, kv_heads, width)
    constants = {"visible": np.ones((batch, length, length), bool)}
    return Operation("attention of the vision encoder", ours, _plain_attention, inputs, constants)


def _attention_inputs(rows: int, length: int, heads: int, kv_heads: int, width: int) -> Arrays:
    rng = np.random.default_rng(2)
    names = {"query": heads, "key": kv_heads, "value": kv_heads}
    return {name: _normal(rng, rows, length, count, width) for name, count in names.items()}


def _heads(inputs: Arrays, dtype: Any) -> list[Array]:
    return [inputs[name].astype(dtype) for name in ("query", "key", "value")]


def _plain_attention(inputs: Arrays, constants: Arrays) -> Array:
    query, key, value = _heads(inputs, jnp.float32)
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / math.sqrt(query.shape[-1])
    scores = jnp.where(constants["visible"][:, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def expert_layer(dispatch: str, tokens: int, width: int, mlp: int) -> Operation:
    """Returns a layer of 4 experts, top 2; no token chooses the last, and some are padding."""
    rng = np.random.default_rng(3)
    config = check_moe(ExpertConfig(num_experts=4, top_k=2, dispatch=dispatch, capacity_factor=1.0))
    hidden, router = _normal(rng, tokens, width), _normal(rng, width, 4, scale=width**-0.5)
    hidden[:, 0], router[0] = 1.0, (0.0, 0.0, 0.0, -64.0)
    inputs = {
        "hidden": hidden,
        "router": router,
        "experts_gate": _normal(rng, 4, width, mlp, scale=width**-0.5),
        "experts_up": _normal(rng, 4, width, mlp, scale=width**-0.5),
        "experts_down": _normal(rng, 4, mlp, width, scale=mlp**-0.5),
    }
    valid = np.arange(tokens) < tokens * 7 // 8
    chosen = np.argsort(-(hidden.astype(np.float64) @ router), axis=-1)[:, : config.top_k]
    slots = math.ceil(valid.sum() * config.top_k / 4) if dispatch == "capacity" else tokens
    constants = {"valid": valid, "chosen": chosen, "keep": _kept(chosen, valid, slots)}

    def ours(inputs: Arrays, constants: Arrays, dtype: Any) -> Array:
        params = {name: x for name, x in inputs.items() if name != "hidden"}
        hidden, valid = inputs["hidden"].astype(dtype)[None], constants["valid"][None]
        layer = MoE(config=config, intermediate_size=mlp, compute=ComputeConfig(dtype=dtype))
        mixed, _ = layer.apply({"params": params}, hidden, valid, jnp.zeros_like(valid))
        return mixed[0].astype(jnp.float32)

    return Operation(f"expert layer, {dispatch}", ours, _plain_experts, inputs, constants)


def _kept(chosen: np.ndarray, valid: np.ndarray, slots: int) -> np.ndarray:
    """Marks assignments that get a slot: all first choices before all second, in token order."""
    free = dict.fromkeys(range(4), slots)
    keep = np.zeros(chosen.shape, bool)
    for choice in range(chosen.shape[1]):
        for token in np.flatnonzero(valid):
            expert = int(chosen[token, choice])
            keep[token, choice] = free[expert] > 0
            free[expert] -= 1
    return keep


def _plain_experts(inputs: Arrays, constants: Arrays) -> Array:
    hidden, chosen = inputs["hidden"], constants["chosen"]
    probs = jax.nn.softmax(hidden @ inputs["router"])
    weights = jnp.take_along_axis(probs, chosen, axis=-1) * constants["keep"]
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    mixed = jnp.zeros_like(hidden)
    for e in range(4):
        gate, up, down = (inputs[f"experts_{name}"][e] for name in ("gate", "up", "down"))
        gated = hidden @ gate
        output = (gated / (1 + jnp.exp(-gated)) * (hidden @ up)) @ down
        mixed += jnp.where(chosen == e, weights, 0.0).sum(axis=-1, keepdims=True) * output
    return mixed
