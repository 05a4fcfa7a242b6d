import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.models.attention_kernels import causal
from moddistill.models.compute import ComputeConfig
from moddistill.models.decoder import Context, Decoder, DecoderConfig, DecoderLayer
from moddistill.models.layer_plan import unstack
from moddistill.models.moe.layer import check_moe
from tests.models import draw

DENSE = DecoderConfig(
    vocab_size=23,
    real_ids=((0, 20),),
    hidden_size=8,
    intermediate_size=12,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
STACKS = {
    "dense": (None, 4),
    "every second layer": ("sparse", 5),
    "all layers": ("dense", 3),
    "three of each four layers": ((0, 2, 3, 4, 6, 7), 8),
}


def decoder_config(placement, layers):
    moe = None if placement is None else check_moe(ExpertConfig(3, 2, placement))
    return dataclasses.replace(DENSE, num_layers=layers, moe=moe)


def context(batch):
    return Context(
        positions=batch.positions,
        structure=causal(batch.segments),
        valid=batch.segments > 0,
        is_image=batch.tokens == 0,
    )


@pytest.mark.parametrize(("placement", "layers"), STACKS.values(), ids=STACKS)
def test_the_scanned_stack_equals_a_loop_over_its_layers(placement, layers):
    config = decoder_config(placement, layers)
    batch = draw.text(config, 2, 5)
    decoder, inputs = Decoder(config, ComputeConfig()), (batch.tokens, None, context(batch))
    params = draw.params(decoder, *inputs, None)
    hidden, head, router, cache = draw.apply(decoder, params, *inputs, None)

    x, all_stats = params["embedding"][batch.tokens], []
    for i, layer in enumerate(unstack(params, config.plan)):
        block = DecoderLayer(
            config=config, has_experts=i in config.moe_layers, compute=ComputeConfig()
        )
        x, stats, _ = draw.apply(block, layer, x, context(batch), None)
        all_stats += [stats] if i in config.moe_layers else []
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    x = np.asarray(x) / np.sqrt(mean_square + config.norm_eps) * np.asarray(params["norm"]["scale"])

    np.testing.assert_allclose(hidden, x, atol=1e-4)
    np.testing.assert_array_equal(head, params["embedding"])
    assert cache is None
    if placement is None:
        assert router is None
    else:
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_stats)
        chex.assert_trees_all_close(router, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [None, "sparse"])
@pytest.mark.parametrize("remat", ["matmuls", "full"])
def test_rematerialised_layers_give_the_same_outputs_and_gradients(placement, remat):
    config = decoder_config(placement, 4)
    batch = draw.text(config, 2, 5)
    inputs = (batch.tokens, None, context(batch), None)
    params = draw.params(Decoder(config, ComputeConfig()), *inputs)

    def outputs_and_gradients(remat):
        def loss(params):
            hidden, _, router, _ = Decoder(config, ComputeConfig(remat=remat)).apply(
                {"params": params}, *inputs
            )
            balance = 0 if router is None else jnp.sum(router.prob**2)
            return jnp.sum(hidden**3) / 100 + balance / 100, hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    chex.assert_trees_all_close(
        outputs_and_gradients(remat), outputs_and_gradients("none"), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("placement", [None, "sparse"])
def test_what_is_computed_again_for_the_gradient(placement):
    """`full` makes a layer's matmuls again, `matmuls` those of attention scores only."""
    config = decoder_config(placement, 2)
    batch = draw.text(config, 2, 5)
    inputs = (batch.tokens, None, context(batch), None)
    params = draw.params(Decoder(config, ComputeConfig()), *inputs)

    def products(remat):
        def loss(params):
            decoder = Decoder(config, ComputeConfig(remat=remat))
            hidden = decoder.apply({"params": params}, *inputs)[0]
            return jnp.sum(hidden**2)

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") < products("matmuls") < products("full")


def test_an_untied_head_is_a_parameter_of_its_own():
    config = dataclasses.replace(DENSE, tie_word_embeddings=False)
    batch = draw.text(config, 1, 2)
    inputs = (batch.tokens, None, context(batch), None)
    decoder = Decoder(config, ComputeConfig())
    params = draw.params(decoder, *inputs)
    _, head, _, _ = draw.apply(decoder, params, *inputs)
    chex.assert_shape(head, (23, 8))
    np.testing.assert_array_equal(head, params["head"])
