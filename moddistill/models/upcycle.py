"""Upcycling: expert layers initialised as copies of a trained feed-forward layer.

With router weights that sum to one over the top k, as is usual for top_k >= 2, the sparse model
equals the dense one to rounding, independent of its routers (Komatsuzaki et al. 2022).

With `moe_intermediate_size`, a copy is sliced into n narrower experts (He et al. 2024,
arXiv 2410.07524). The slices of a copy have equal columns of the router, so that top_k, a multiple
of n, selects complete copies. Each slice then has 1 / n of its copy's weight, so its `down` is
scaled by n: sum_i (w / n) * n * y_i = w * sum_i y_i, the output of the dense layer. `noise` and
`drop` make copies differ, and the models are no longer equal.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moddistill.config import UPCYCLE_METHODS, ExpertConfig, UpcycleConfig
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.models.layer_plan import stack, unstack
from moddistill.models.moe.layer import check_moe
from moddistill.models.vlm import ModelConfig

COPY = UpcycleConfig()
_KERNELS = ("gate", "up", "down")
_MAX_NOISE = 1e4  # in float16, a draw beyond six standard deviations is still finite


def upcycle_config(config: ModelConfig, moe: ExpertConfig) -> ModelConfig:
    """The sparse architecture; UserError if the model is sparse already or `moe` is invalid."""
    if config.decoder.moe is not None:
        raise UserError(
            "expected a dense model to upcycle, got one with "
            f"{config.decoder.moe.num_experts} experts in layers {config.decoder.moe_layers}"
        )
    decoder = dataclasses.replace(config.decoder, moe=check_moe(moe))
    _check_slices(decoder.moe, decoder.intermediate_size)
    decoder.plan  # noqa: B018  raises for a placement that does not fit
    return dataclasses.replace(config, decoder=decoder)


def check_upcycle(config: UpcycleConfig) -> UpcycleConfig:
    """Returns the config; UserError for an unknown method or a number that it does not use."""
    if config.method not in UPCYCLE_METHODS:
        raise not_one_of("upcycle.method", config.method, UPCYCLE_METHODS)
    for method, name, most in (("noise", "noise_std", _MAX_NOISE), ("drop", "drop_fraction", 1.0)):
        value = getattr(config, name)
        if config.method != method and value != 0:
            expected = f"0 with method {config.method!r}, since only {method!r} reads it"
            raise invalid(f"upcycle.{name}", value, expected)
        if config.method == method and not 0 < value <= most:
            raise invalid(f"upcycle.{name}", value, f"> 0 and <= {most:,.0f} with {method!r}")
    return config


def upcycle(
    params: dict[str, Any],
    config: ModelConfig,
    rng: jax.Array,
    how: UpcycleConfig = COPY,
) -> dict[str, Any]:
    """Parameters of the sparse `config` from those of its dense model.

    Expert layers are made by `upcycle_layer`; all other parameters are unchanged.
    """
    decoder = config.decoder
    dense_plan = dataclasses.replace(decoder, moe=None).plan
    names = [f"segment_{i}" for i in range(len(dense_plan))]
    layers = unstack({name: params["decoder"][name] for name in names}, dense_plan)
    for i in decoder.moe_layers:
        layers[i] = upcycle_layer(layers[i], decoder.moe, jax.random.fold_in(rng, i), how)
    rest = {name: leaf for name, leaf in params["decoder"].items() if name not in names}
    return {**params, "decoder": {**rest, **stack(layers, decoder.plan)}}


def upcycle_layer(
    layer: dict[str, Any],
    moe: ExpertConfig,
    rng: jax.Array,
    how: UpcycleConfig = COPY,
) -> dict[str, Any]:
    """The parameters of one decoder layer with experts in place of its feed-forward layer.

    Experts are made by `upcycle_expert`, the rest by `upcycle_router`.

    Args:
      layer: of a dense model, not stacked.
      moe: checked by `upcycle_config`.
      rng: for the router, noise and dropped dimensions.
      how: checked by `check_upcycle`.
    """
    mlp = layer["mlp"]
    # A map, not a vmap: batched operations could differ in the last bit from one expert's.
    experts = jax.lax.map(
        lambda number: upcycle_expert(mlp, moe, how, rng, number), jnp.arange(moe.num_experts)
    )
    params = upcycle_router(mlp, moe, rng) | experts
    return {name: leaf for name, leaf in layer.items() if name != "mlp"} | {"moe": params}


def upcycle_expert(
    mlp: dict[str, Any],
    moe: ExpertConfig,
    how: UpcycleConfig,
    rng: jax.Array,
    number: jax.Array | int,
) -> dict[str, Array]:
    """The kernels of one expert, in the dtype of the feed-forward layer `mlp`.

    A copy of the layer or of a slice of it, changed by the method of `how`.
    """
    width, dense = mlp["gate"]["kernel"].shape
    slices = _slices(moe, dense)
    size = dense // slices
    start = (number % slices) * size  # expert number is slice number % slices of its copy

    def slice_of(name: str) -> Array:
        kernel = mlp[name]["kernel"]
        if name == "down":
            # Scaled by n, since each slice has 1 / n of its copy's router weight.
            return slices * jax.lax.dynamic_slice(kernel, (start, 0), (size, width))
        return jax.lax.dynamic_slice(kernel, (0, start), (width, size))

    expert = {name: slice_of(name) for name in _KERNELS}
    # The router is drawn from `rng` itself, so changes need a key derived from it.
    change_rng = jax.random.fold_in(jax.random.fold_in(rng, 1), number)
    if how.method == "noise":
        expert = _add_noise(expert, how.noise_std, change_rng)
    if how.method == "drop":
        expert = _drop(expert, how.drop_fraction, change_rng)
    return {f"experts_{name}": kernel for name, kernel in expert.items()}


def upcycle_router(mlp: dict[str, Any], moe: ExpertConfig, rng: jax.Array) -> dict[str, Any]:
    """Parameters of an expert layer other than its experts'.

    Routers are float32, normal with standard deviation 0.02; a residual layer is the original one,
    blended equally.
    """
    # One column per copy, repeated for its slices: equal logits, so top k selects them together.
    width, dense = mlp["gate"]["kernel"].shape
    slices = _slices(moe, dense)
    router = 0.02 * jax.random.normal(rng, (width, moe.num_experts // slices), jnp.float32)
    params: dict[str, Any] = {"router": jnp.repeat(router, slices, axis=1)}
    if moe.residual:
        params["residual"] = mlp
        # softmax(0) = (1/2, 1/2): experts and the dense layer are equal, and so is their mean.
        params["blend"] = jnp.zeros((width, 2), jnp.float32)
        params["blend_bias"] = jnp.zeros(2, jnp.float32)
    return params


def _slices(moe: ExpertConfig, dense: int) -> int:
    """Number of experts that one copy of a layer of width `dense` is sliced into."""
    return dense // (moe.moe_intermediate_size or dense)


def _check_slices(moe: ExpertConfig, dense: int) -> None:
    """Raises UserError unless experts add up to complete copies of a layer of width `dense`."""
    size = moe.moe_intermediate_size or dense
    if dense % size:
        expected = f"0, or a divisor of the dense layer's width, {dense}"
        raise invalid("moe.moe_intermediate_size", size, expected)
    slices = _slices(moe, dense)
    for name in ("num_experts", "top_k"):
        if getattr(moe, name) % slices:
            expected = (
                f"a multiple of {slices}, since moe.moe_intermediate_size {size} slices a layer "
                f"of width {dense} into {slices} experts"
            )
            raise invalid(f"moe.{name}", getattr(moe, name), expected)
    # Otherwise the weights of the selected slices, and so of their copies, do not sum to one.
    if slices > 1 and not moe.norm_topk_prob:
        expected = (
            f"True, since moe.moe_intermediate_size {size} slices a layer of width {dense} into "
            f"{slices} experts, whose weights must sum to one"
        )
        raise invalid("moe.norm_topk_prob", moe.norm_topk_prob, expected)


def _add_noise(expert: dict[str, Array], std: float, rng: jax.Array) -> dict[str, Array]:
    rngs = jax.random.split(rng, len(_KERNELS))

    def noisy(kernel: Array, rng: jax.Array) -> Array:
        noise = std * jax.random.normal(rng, kernel.shape, jnp.float32)
        return (kernel + noise).astype(kernel.dtype)

    return {name: noisy(expert[name], rng) for name, rng in zip(_KERNELS, rngs, strict=True)}


def _drop(expert: dict[str, Array], fraction: float, rng: jax.Array) -> dict[str, Array]:
    """One expert with a fraction of its dimensions re-initialised (Nakamura et al. 2025).

    New entries of a kernel are normal, with the mean and standard deviation of those replaced.
    """
    width = len(expert["down"])
    which, *rngs = jax.random.split(rng, 1 + len(_KERNELS))
    dropped = jax.random.permutation(which, width)[: round(fraction * width)]

    def reinitialised(kernel: Array, rng: jax.Array) -> Array:
        old = kernel[dropped].astype(jnp.float32)
        new = jnp.mean(old) + jnp.std(old) * jax.random.normal(rng, old.shape)
        return kernel.at[dropped].set(new.astype(kernel.dtype))

    return {
        # A dimension is a column of `gate` and `up` and a row of `down`; transposed, all are rows.
        "gate": reinitialised(expert["gate"].T, rngs[0]).T,
        "up": reinitialised(expert["up"].T, rngs[1]).T,
        "down": reinitialised(expert["down"], rngs[2]),
    }
