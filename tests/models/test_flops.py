import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.distributed.sharding import unbox
from moddistill.models import attention_kernels
from moddistill.models.batch import Batch, PreferenceBatch, make_batch
from moddistill.models.flops import (
    StepSize,
    decoder_flops,
    forward_flops,
    size_of_batch,
    step_flops,
    training_flops,
    vision_flops,
)
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import Vlm, abstract_params
from moddistill.params import flatten, unflatten

ROWS = 2


def full_rows(length):
    """Rows of one sample each, whose tokens are all supervised."""
    return StepSize(ROWS * length, ROWS * length**2, images=0, supervised=ROWS * length)


TOKENS = full_rows(64)


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


def compiled_flops(config, function, length=64):
    params = unbox(abstract_params(config))
    batch = make_batch(jax.ShapeDtypeStruct, rows=ROWS, length=length)
    return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]


def test_forward_is_what_the_compiler_counts():
    config = one_layer()
    found = compiled_flops(config, lambda p, b: Vlm.logits(Vlm(config).apply({"params": p}, b)))
    assert forward_flops(config, TOKENS) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("trained", [".*", "decoder/.*/mlp/.*"])
@pytest.mark.parametrize("length", [64, 512])
def test_backward_is_what_the_compiler_counts(monkeypatch, length, trained):
    """Of all weights, and of a part above which attention is frozen (and the embedding is not).

    With all scores, as they are counted: of keys after a query, too.
    """
    monkeypatch.setattr(attention_kernels, "_PARTS", 1)
    monkeypatch.setattr(attention_kernels, "_PART", length)
    config = one_layer()
    paths = set(flatten(unbox(abstract_params(config))))
    trained = {path for path in paths if re.fullmatch(trained, path)} | {"decoder/embedding"}

    def loss(some, params, batch):
        params = unflatten(flatten(params) | some)
        return jnp.sum(Vlm.logits(Vlm(config).apply({"params": params}, batch)) ** 2)

    def gradient(params, batch):
        some = {path: x for path, x in flatten(params).items() if path in trained}
        return jax.grad(loss)(some, params, batch)

    found = compiled_flops(config, gradient, length)
    assert training_flops(config, full_rows(length), trained) == pytest.approx(found, rel=0.03)


def test_only_the_chosen_experts_count():
    dense, sparse = one_layer(), one_layer(ExpertConfig(num_experts=8, top_k=2, placement="dense"))
    layer = 6 * 256 * 512
    router = 2 * 256 * 8
    difference = decoder_flops(sparse.decoder) - decoder_flops(dense.decoder)
    assert difference == layer + router


def test_published_tower():
    """ViT-L/14 at 336 pixels takes 191 G multiply-adds with its 24 layers, of which 23 are run."""
    tower = preset("qwen2-0.5b").vision
    assert vision_flops(tower) * 24 / 23 == pytest.approx(2 * 191e9, rel=0.02)


def test_content_of_a_batch_is_that_of_its_samples():
    """Two images of 4 patches in samples of 9, 10 and 2 tokens, with padding between them."""
    config = preset("tiny")
    segments = jnp.asarray([[1] * 9 + [0] * 3 + [3] * 10, [2] * 2 + [0] * 20])
    positions = jnp.asarray([[*range(9), 0, 1, 2, *range(10)], range(22)])
    tokens = jnp.zeros((2, 22), jnp.int32).at[0, 2:6].set(config.image_token_id)
    tokens = tokens.at[0, 14:18].set(config.image_token_id)
    tokens = tokens.at[:, 10].set(config.image_token_id)  # of padding
    loss_mask = jnp.zeros((2, 22), bool).at[0, 7:9].set(True).at[:, 1].set(True)
    batch = Batch(tokens, positions, segments, loss_mask)
    assert size_of_batch(batch, config) == (21, 81 + 100 + 4, 2, 4)
    # Both sides share their images; here they are equal.
    pair = PreferenceBatch(batch, batch)
    assert size_of_batch(pair, config) == (42, 2 * 185, 2, 8)
    text = dataclasses.replace(config, vision=None)
    assert size_of_batch(batch, text).images == 0


def test_squared_lengths_do_not_overflow():
    shape = (2, 2**16)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    ones = jnp.ones(shape, jnp.int32)
    batch = Batch(ones, positions, ones, ones.astype(bool))
    assert size_of_batch(batch, one_layer()).squared_lengths == 2.0**33


def test_flops_of_a_step_are_those_of_its_samples(tiny_architecture):
    """Student and teacher, with images: twice the content is twice the work, none is none."""
    student, teacher = tiny_architecture("tiny", ExpertConfig()), tiny_architecture("tiny-teacher")
    trained = {path for path in flatten(abstract_params(student)) if "/moe/" in path}
    count = functools.partial(step_flops, student, teacher, trained=trained, shared_tower=False)
    parts = [count(StepSize(*row)) for row in 3.0 * np.eye(4)]
    assert all(flops.student > 0 and flops.teacher > 0 for flops in parts)
    total = count(StepSize(3.0, 3.0, 3.0, 3.0))
    np.testing.assert_allclose(np.sum(parts, axis=0), total)
    np.testing.assert_allclose(count(StepSize(6.0, 6.0, 6.0, 6.0)), 2 * np.asarray(total))


def test_a_teacher_reads_images_as_its_own_patches(tiny_architecture):
    """A sample of 4 patches and 6 tokens of text, of which the teacher has 16 and 6."""
    student, teacher = tiny_architecture(), tiny_architecture("tiny-teacher")
    vision = dataclasses.replace(teacher.vision, patch_size=7)
    teacher = dataclasses.replace(teacher, vision=vision)
    size = StepSize(tokens=10.0, squared_lengths=100.0, images=1.0, supervised=5.0)
    found = step_flops(student, teacher, size, set(), shared_tower=False).teacher
    between = 2 * 6 * 12  # scores of text and further patches, which do not count
    its = StepSize(tokens=22.0, squared_lengths=22.0**2 - between, images=1.0, supervised=5.0)
    assert found == forward_flops(teacher, its)
    # Both answers of a pair have the image, which is encoded once.
    pair = StepSize(tokens=20.0, squared_lengths=200.0, images=1.0, supervised=10.0)
    found = step_flops(student, teacher, pair, set(), shared_tower=False, sides=2).teacher
    its = StepSize(44.0, 2 * (22.0**2 - between), images=1.0, supervised=10.0)
    assert found == forward_flops(teacher, its)


def test_answers_of_the_student_are_a_forward_pass_of_their_rows(tiny_architecture):
    student = tiny_architecture()
    size = StepSize(tokens=40.0, squared_lengths=400.0, images=3.0, supervised=5.0)
    count = functools.partial(step_flops, student, None, size, set(), shared_tower=False)
    more = count(answered=0.25).student - count().student
    assert more == pytest.approx(forward_flops(student, size) / 4)


def test_logits_at_image_positions_count_like_those_at_supervised_ones(tiny_architecture):
    student, teacher = tiny_architecture(), tiny_architecture("tiny-teacher")
    trained = set(flatten(abstract_params(student)))
    count = functools.partial(step_flops, student, teacher, trained=trained, shared_tower=False)
    size = StepSize(tokens=40.0, squared_lengths=400.0, images=3.0, supervised=5.0)
    more = size._replace(supervised=5.0 + 3.0 * student.vision.patches)
    assert count(size, image_logits=True) == count(more) > count(size)


def test_frozen_weights_cost_no_gradient():
    config = one_layer()
    paths = set(flatten(unbox(abstract_params(config))))
    mlp = {path for path in paths if "/mlp/" in path}
    some, everything = (training_flops(config, TOKENS, trained) for trained in (mlp, paths))
    assert 2 * forward_flops(config, TOKENS) < some < everything
