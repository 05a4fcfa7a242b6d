import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from moddistill.models.compute import ComputeConfig
from moddistill.models.vision import Vision, VisionConfig
from moddistill.params import count
from tests import torch_or_skip as torch
from tests.parity.convert import numpy_state, pixel_values, randomise, vision_params

TWO_BY_TWO = VisionConfig(
    image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4
)
TOWERS = {
    "two by two patches": TWO_BY_TWO,
    "five by five patches": dataclasses.replace(TWO_BY_TWO, image_size=30, patch_size=6),
    "four by four patches and a rest": dataclasses.replace(TWO_BY_TWO, image_size=30, patch_size=7),
    "one patch": dataclasses.replace(TWO_BY_TWO, image_size=14),
    "odd heads": dataclasses.replace(TWO_BY_TWO, hidden_size=21, num_heads=3),
    "one head": dataclasses.replace(TWO_BY_TWO, num_heads=1, num_layers=2),
    "exact gelu": dataclasses.replace(TWO_BY_TWO, activation="gelu"),
    "last layer": dataclasses.replace(TWO_BY_TWO, select_layer=-1),
    "third layer from the end": dataclasses.replace(TWO_BY_TWO, select_layer=-3, num_layers=5),
}


def clip_config(config):
    return CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
    )


def random_images(config, number):
    shape = (number, config.image_size, config.image_size, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_features_equal_the_hidden_states_of_clip_without_the_class_token(config):
    tower = randomise(CLIPVisionModel(clip_config(config)))
    images = random_images(config, 3)
    with torch.no_grad():
        states = tower(pixel_values(images, config), output_hidden_states=True).hidden_states
    theirs = states[config.select_layer][:, 1:].numpy()

    vision = Vision(config, ComputeConfig())
    params = vision_params(numpy_state(tower), config)
    ours = jax.jit(vision.apply)({"params": params}, jnp.asarray(images))

    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_every_tensor_of_clip_maps_to_a_parameter(config):
    tower = randomise(CLIPVisionModel(clip_config(config)))
    vision = Vision(config, ComputeConfig())
    shapes = jax.eval_shape(vision.init, jax.random.key(0), random_images(config, 1))["params"]
    params = vision_params(numpy_state(tower), config)
    chex.assert_trees_all_equal_shapes(params, nn.unbox(shapes))
    assert count(params) == sum(parameter.numel() for parameter in tower.parameters())
