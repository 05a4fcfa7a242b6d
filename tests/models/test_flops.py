import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moddistill.config import ExpertConfig
from moddistill.distributed.sharding import unbox
from moddistill.models.batch import make_batch
from moddistill.models.flops import (
    StepSize,
    decoder_flops,
    forward_flops,
    training_flops,
    vision_flops,
)
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import Vlm, abstract_params
from moddistill.params import flatten, unflatten

TOKENS = StepSize(rows=2, length=64, images=0, supervised=128)


def one_layer(moe=None):
    """Wide enough for matrix products to be nearly all the work; one layer, as loops count once."""
    config = dataclasses.replace(preset("tiny"), vision=None)
    decoder = dataclasses.replace(
        config.decoder,
        hidden_size=256,
        intermediate_size=512,
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
    )
    config = dataclasses.replace(config, decoder=decoder)
    return config if moe is None else upcycle_config(config, moe)


def compiled_flops(config, function, tokens=TOKENS):
    params = unbox(abstract_params(config))
    batch = make_batch(jax.ShapeDtypeStruct, rows=tokens.rows, length=tokens.length)
    return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]


def test_forward_is_what_the_compiler_counts():
    config = one_layer()
    found = compiled_flops(config, lambda p, b: Vlm.logits(Vlm(config).apply({"params": p}, b)))
    assert forward_flops(config, TOKENS) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("trained", [".*", "decoder/.*/mlp/.*"])
@pytest.mark.parametrize("length", [64, 512])
def test_backward_is_what_the_compiler_counts(length, trained):
    """Of all weights, and of a part above which attention is frozen (and the embedding is not)."""
    config, tokens = one_layer(), StepSize(rows=2, length=length, images=0, supervised=2 * length)
    paths = set(flatten(unbox(abstract_params(config))))
    trained = {path for path in paths if re.fullmatch(trained, path)} | {"decoder/embedding"}

    def loss(some, params, batch):
        params = unflatten(flatten(params) | some)
        return jnp.sum(Vlm.logits(Vlm(config).apply({"params": params}, batch)) ** 2)

    def gradient(params, batch):
        some = {path: x for path, x in flatten(params).items() if path in trained}
        return jax.grad(loss)(some, params, batch)

    found = compiled_flops(config, gradient, tokens)
    assert training_flops(config, tokens, trained) == pytest.approx(found, rel=0.03)


def test_only_the_chosen_experts_count():
    dense, sparse = one_layer(), one_layer(ExpertConfig(num_experts=8, top_k=2, placement="dense"))
    layer = 6 * 256 * 512
    router = 2 * 256 * 8
    difference = decoder_flops(sparse.decoder, 64) - decoder_flops(dense.decoder, 64)
    assert difference == layer + router


def test_published_tower():
    """ViT-L/14 at 336 pixels takes 191 G multiply-adds with its 24 layers, of which 23 are run."""
    tower = preset("qwen2-0.5b").vision
    assert vision_flops(tower) * 24 / 23 == pytest.approx(2 * 191e9, rel=0.02)


def test_frozen_weights_cost_no_gradient():
    config = one_layer()
    paths = set(flatten(unbox(abstract_params(config))))
    mlp = {path for path in paths if "/mlp/" in path}
    some, everything = (training_flops(config, TOKENS, trained) for trained in (mlp, paths))
    assert 2 * forward_flops(config, TOKENS) < some < everything
