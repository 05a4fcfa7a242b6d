import dataclasses

import jax
import pytest

from moddistill.config import ExpertConfig
from moddistill.distributed.accelerators import CHIPS
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.planning import roofline
from moddistill.planning.roofline import (
    AnswerSize,
    Work,
    answer_size,
    experts_in_use,
    least_seconds,
    prefill_work,
    token_work,
)

DENSE = preset("qwen2-0.5b")
SPARSE = upcycle_config(DENSE, ExpertConfig())
SIZE = answer_size(DENSE, rows=1, text_tokens=64, images=1, new_tokens=48)


def test_prompt_has_the_patches_of_its_images_and_the_text():
    assert AnswerSize(rows=1, prompt_tokens=576 + 64, images=1, new_tokens=48) == SIZE
    assert answer_size(DENSE, 2, 64, 3, 48).prompt_tokens == 3 * 576 + 64
    text = dataclasses.replace(DENSE, vision=None)
    assert answer_size(text, 2, 64, 0, 48).prompt_tokens == 64
    with pytest.raises(ValueError, match=r"^images: expected 0 for a model without .*, got 1$"):
        answer_size(text, 2, 64, 1, 48)


def test_time_is_that_of_the_scarcer_of_flops_and_bandwidth():
    chip = CHIPS["v5e"]
    assert least_seconds(Work(chip.flops * 3, chip.bandwidth * 2), chip) == pytest.approx(3)
    assert least_seconds(Work(chip.flops, chip.bandwidth * 2), chip) == pytest.approx(2)


def test_a_device_has_its_share_of_a_chip():
    """An answer runs on one of the two devices of a TPU7x."""
    chip = CHIPS["tpu7x"]
    assert least_seconds(Work(chip.flops, 0), chip) == pytest.approx(2)


def test_one_token_uses_top_k_experts_and_many_use_all():
    assert experts_in_use(4, 2, 1) == 2 / 4
    assert experts_in_use(4, 2, 2) == 1 - 1 / 4
    assert experts_in_use(8, 1, 3) == pytest.approx(1 - (7 / 8) ** 3)
    assert experts_in_use(4, 2, 640) == pytest.approx(1)


def test_bytes_of_a_token_worked_by_hand():
    """Qwen2-0.5B: a tied head of 151,936 x 896, 24 layers, 2 heads of keys and values."""
    width, mlp, kv = 896, 4864, 2 * 64
    attention = 2 * width * width + 2 * width * kv + (width + 2 * kv)  # q and o, k and v, biases
    layer = attention + 3 * width * mlp
    kernels = 2 * (24 * layer + 151_936 * width)
    norms = 4 * (2 * 24 + 1) * width
    cache = 2 * 24 * 2 * kv * (640 + 24)
    assert token_work(DENSE, SIZE, "bfloat16").bytes == kernels + norms + cache


def test_a_token_reads_one_more_expert_in_each_sparse_layer_than_a_dense_one():
    expert, router = 3 * 896 * 4864, 896 * 4
    more = 12 * (2 * expert + 4 * router)
    dense, sparse = (token_work(config, SIZE, "bfloat16") for config in (DENSE, SPARSE))
    assert sparse.bytes - dense.bytes == more
    assert sparse.flops - dense.flops == 12 * 2 * (expert + router)


def test_rows_share_the_parameters_and_have_caches_of_their_own():
    one = token_work(DENSE, SIZE, "bfloat16")
    two = token_work(DENSE, SIZE._replace(rows=2), "bfloat16")
    cache = 2 * 24 * 2 * 2 * 64 * (640 + 24)
    assert two.bytes - one.bytes == cache
    assert two.flops == 2 * one.flops


def test_prompt_reads_all_experts_and_the_layers_of_the_vision_encoder_that_it_uses():
    text = prefill_work(SPARSE, SIZE._replace(images=0), "float32").bytes
    image = prefill_work(SPARSE, SIZE, "float32").bytes
    params = roofline.loaded_params(SPARSE, "float32")
    used = {name: x for name, x in params["vision"].items() if name not in ("unused", "post_norm")}
    assert image - text == total_bytes(used) + total_bytes(params["projector"])
    assert text == pytest.approx(total_bytes(params["decoder"]), rel=1e-9)


def test_head_that_is_not_tied_leaves_the_embedding_to_a_lookup():
    """Qwen1.5-1.8B reads 1 of 151,936 rows of its embedding for a token."""
    config = preset("qwen1.5-1.8b")
    table = 151_936 * 2048 * 2
    tied = dataclasses.replace(config.decoder, tie_word_embeddings=True)
    one, other = (
        token_work(dataclasses.replace(config, decoder=decoder), SIZE, "bfloat16").bytes
        for decoder in (config.decoder, tied)
    )
    assert one - other == table / 151_936


def total_bytes(params):
    return sum(map(roofline.num_bytes, jax.tree.leaves(params)))
