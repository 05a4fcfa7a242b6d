"""The experts of each token, against the router worked by hand and the statistics of training."""

import dataclasses

import jax
import numpy as np
import pytest

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.convert.resolve import load
from moddistill.distributed.sharding import make_mesh
from moddistill.evals.expert_load import expert_load
from moddistill.explorer.routing import Routing, route, same_experts
from moddistill.inference.prompts import Prompt, encode_prompt, load_images
from moddistill.models.vlm import Vlm
from moddistill.params import flatten, unflatten


def routing_of(model, params, prompt, tokenizer):
    ids = encode_prompt(prompt, model.config, tokenizer)
    images = load_images(prompt, model.config.vision)
    return route(model, params, ids, images, tokenizer.pad_id)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.slow
def test_probabilities_are_those_of_the_router_worked_by_hand(tiny_architecture, init, tokenizer):
    """Without attention, a token's router in the first layer sees its embedding only."""
    config = tiny_architecture("tiny", ExpertConfig(num_experts=5, top_k=2))
    params = flatten(init(config, 3))
    for path in params:
        if path.startswith("decoder/") and "attention/out" in path:
            params[path] = jax.numpy.zeros_like(params[path])
    assert any("attention/out" in path for path in params)
    prompt = Prompt("what is it, and why?")
    found = routing_of(Vlm(config), unflatten(params), prompt, tokenizer)

    embedded = np.asarray(params["decoder/embedding"])[list(found.token_ids)]
    normed = embedded / np.sqrt(
        np.mean(embedded**2, axis=-1, keepdims=True) + config.decoder.norm_eps
    )
    [layer] = {path.rsplit("/", 2)[0] for path in params if path.endswith("block_0/moe/router")}
    normed = normed * np.asarray(params[f"{layer}/mlp_norm/scale"][0])
    expected = softmax(normed @ np.asarray(params[f"{layer}/moe/router"][0]))
    np.testing.assert_allclose(found.probs[0], expected, atol=1e-5)
    first = np.argmax(expected, axis=-1)
    np.testing.assert_array_equal(found.experts[0, :, 0], first)
    without = np.where(np.arange(5) == first[:, None], -1, expected)
    np.testing.assert_array_equal(found.experts[0, :, 1], np.argmax(without, axis=-1))
    np.testing.assert_allclose(found.entropy[0], -(expected * np.log2(expected)).sum(-1), rtol=1e-4)


def test_loads_are_those_that_training_reports(tiny_models, tokenizer, image):
    prompt = Prompt("<image>\n<image>\nis it red?", (image(0), image(1)), (("hello", "yes"),))
    model, params = load(tiny_models["sparse"], stacked=False)
    found = routing_of(model, params, prompt, tokenizer)
    assert found.layers == model.config.decoder.moe_layers
    assert found.is_image.sum() == 2 * model.config.vision.patches
    expected = expert_load(*load(tiny_models["sparse"]), tokenizer, [prompt])
    for i, layer in enumerate(expected):
        np.testing.assert_allclose(found.load(i, found.is_image), layer["image"], atol=1e-6)
        np.testing.assert_allclose(found.load(i, ~found.is_image), layer["text"], atol=1e-6)


def test_routing_does_not_depend_on_the_mesh_nor_on_capacity(tiny_models, tokenizer):
    prompt = Prompt("is it red?")
    model, params = load(tiny_models["sparse"])
    expected = routing_of(model, params, prompt, tokenizer)
    moe = dataclasses.replace(model.config.decoder.moe, dispatch="capacity")
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    capped = model.clone(config=dataclasses.replace(model.config, decoder=decoder))
    found = routing_of(capped, params, prompt, tokenizer)
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-5)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    sharded = routing_of(*load(tiny_models["sparse"], mesh=mesh), prompt, tokenizer)
    np.testing.assert_allclose(sharded.probs, expected.probs, atol=1e-5)


def routing(probs, is_image=None):
    probs = np.array(probs, np.float32)
    count = probs.shape[1]
    is_image = np.zeros(count, bool) if is_image is None else np.array(is_image)
    ids = tuple(range(count))
    return Routing(layers=(0,), top_k=2, token_ids=ids, is_image=is_image, probs=probs)


def test_of_equal_experts_the_first_is_chosen_and_entropy_is_in_bits():
    found = routing([[[0.25] * 4, [0, 0, 1, 0]]])
    np.testing.assert_array_equal(found.experts[0, 0], jax.lax.top_k(np.full(4, 0.25), 2)[1])
    np.testing.assert_allclose(found.entropy, [[2, 0]], atol=1e-6)


def test_tokens_that_do_not_exist_have_no_load():
    one = routing([[[0.6, 0.4], [0.3, 0.7]]])
    assert one.load(0, np.zeros(2, bool)).tolist() == [0, 0]


def test_models_share_experts_by_token_and_choice():
    one, other = routing([[[0.6, 0.4], [0.3, 0.7]]]), routing([[[0.9, 0.1], [0.8, 0.2]]])
    assert same_experts(one, other, 0, 0, 2).tolist() == [True, False]
    assert same_experts(one, other, 0, 1, 1).tolist() == [True]
