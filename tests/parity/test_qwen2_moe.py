import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Qwen2MoeConfig
from transformers.models import qwen2_moe

from moddistill.config import ExpertConfig
from moddistill.models.compute import ComputeConfig
from moddistill.models.moe.layer import MoE
from tests import torch_or_skip as torch
from tests.parity.convert import numpy_state, randomise

WIDTH, MLP = 16, 24


def torch_block(num_experts, top_k, norm_topk_prob):
    """The sparse block of Qwen2-MoE, whose shared expert gives nothing."""
    block = qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=MLP,
            shared_expert_intermediate_size=MLP,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=norm_topk_prob,
            experts_implementation="eager",
        )
    )
    randomise(block)
    block.shared_expert.down_proj.weight.data.zero_()
    return block


def converted(state):
    gate, up = np.split(state["experts.gate_up_proj"], 2, axis=1)
    weights = {"gate": gate, "up": up, "down": state["experts.down_proj"]}
    params = {f"experts_{name}": x.transpose(0, 2, 1) for name, x in weights.items()}
    return {name: jnp.asarray(x) for name, x in params.items()} | {
        "router": jnp.asarray(state["gate.weight"].T)
    }


def by_loop(hidden, params, top_k, norm_topk_prob):
    """The layer as a loop over tokens and their experts, in float64."""
    router, gate, up, down = (
        np.asarray(params[name], np.float64)
        for name in ("router", "experts_gate", "experts_up", "experts_down")
    )
    out = np.zeros(hidden.shape)
    for index in np.ndindex(hidden.shape[:-1]):
        x = hidden[index].astype(np.float64)
        probs = np.exp(x @ router) / np.exp(x @ router).sum()
        chosen = np.argsort(-probs)[:top_k]
        total = probs[chosen].sum() if norm_topk_prob else 1
        for e in chosen:
            a = x @ gate[e]
            out[index] += probs[e] / total * ((a / (1 + np.exp(-a)) * (x @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (4, 3), (3, 3), (8, 2)])
def test_experts_equal_those_of_qwen2_moe(num_experts, top_k, norm_topk_prob):
    block = torch_block(num_experts, top_k, norm_topk_prob)
    hidden = np.random.default_rng(1).normal(size=(2, 13, WIDTH)).astype(np.float32)
    with torch.no_grad():
        theirs = block(torch.tensor(hidden)).numpy()

    config = ExpertConfig(num_experts, top_k, norm_topk_prob=norm_topk_prob)
    params = converted(numpy_state(block))
    valid = jnp.ones((2, 13), bool)
    layer = MoE(config=config, intermediate_size=MLP, compute=ComputeConfig())
    ours, _ = jax.jit(layer.apply)({"params": params}, jnp.asarray(hidden), valid, ~valid)

    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(ours, by_loop(hidden, params, top_k, norm_topk_prob), atol=1e-5)
