"""Losses against a teacher that is not run: targets in the batch, as a cache has them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, MeshConfig, RouterLossConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.losses.chunked import LogitInputs, chunked_token_loss
from moddistill.losses.distillation import loss_masks, token_loss
from moddistill.losses.divergences import divergence_to
from moddistill.models.batch import CachedTargets
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import num_ids, token_mask
from moddistill.params import flatten
from moddistill.teachers.cached import CachedTeacher
from moddistill.teachers.live import LiveTeacher
from moddistill.teachers.targets import Targets, Teacher

POSITIONS, WIDTH, VOCAB, TOP_K = 64, 8, 22, 5
REAL = ((0, 7), (8, 20))
IDS = np.flatnonzero(token_mask(REAL, VOCAB))
TEACHER = CachedTeacher("top_k", REAL)


@pytest.fixture(scope="module")
def arrays():
    """Inputs of a student's logits, a cache, and weights of a quarter of the positions."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = np.stack([rng.choice(IDS, TOP_K, replace=False) for _ in range(POSITIONS)])
    log_p = jax.nn.log_softmax(normal(POSITIONS, TOP_K + 1))
    supervised = rng.permutation(POSITIONS) < POSITIONS // 4
    known = CachedTargets(jnp.asarray(supervised), jnp.asarray(ids), log_p[:, :-1], log_p[:, -1])
    weights = jnp.asarray(supervised * rng.uniform(0.1, 1.0, POSITIONS), jnp.float32)
    return LogitInputs(normal(POSITIONS, WIDTH), normal(VOCAB, WIDTH)), known, weights


def chunked(inputs, known, weights):
    def token_fn(logits, targets, labels):
        return {
            "kd": divergence_to(TEACHER.predictions(targets, REAL), logits, DistillationConfig())
        }

    return chunked_token_loss(
        token_fn,
        inputs,
        jnp.zeros(POSITIONS, jnp.int32),
        {"kd": weights},
        Targets(known),
        chunk_size=3,
        real_ids=REAL,
    )[0]


def plain(inputs, known, weights):
    """`sum_t w_t sum_k p_tk log(p_tk / q_tk)` over K ids and the rest, from all logits at once."""
    q = jax.nn.softmax((inputs.hidden @ inputs.head.T)[:, IDS])
    q = jnp.take_along_axis(q, jnp.searchsorted(IDS, known.ids), axis=1)
    q = jnp.concatenate([q, 1 - jnp.sum(q, axis=1, keepdims=True)], axis=1)
    log_p = jnp.concatenate([known.logprobs, known.log_rest[:, None]], axis=1)
    return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - jnp.log(q)), axis=1))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)], ids=["1", "2x4"])
def test_kl_to_cached_log_probabilities_is_that_of_full_logits(arrays, mesh):
    inputs, known, weights = arrays

    def value_and_gradients(fn):
        return jax.jit(jax.value_and_grad(lambda inputs: fn(inputs, known, weights)))(inputs)

    expected = value_and_gradients(plain)
    if mesh is None:
        found = value_and_gradients(chunked)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.device_get(value_and_gradients(chunked))
    assert expected[0] > 1
    chex.assert_trees_all_close(found, jax.device_get(expected), atol=1e-5, rtol=1e-5)


def test_targets_of_all_ids_give_the_loss_of_the_live_teacher(
    tiny_architecture, init, random_batch
):
    student, teacher = (
        dataclasses.replace(tiny_architecture(name), vision=None)
        for name in ("tiny", "tiny-teacher")
    )
    batch = jax.tree.map(jnp.asarray, random_batch(student, rows=2, length=16))
    params, teacher_params = flatten(init(student, 0)), init(teacher, 1)
    live, real_ids = LiveTeacher(Vlm(teacher)), teacher.decoder.real_ids
    output = Vlm(teacher).apply({"params": teacher_params}, batch)
    predictions = live.predictions(live.targets(teacher_params, batch, output), real_ids)
    log_probs = jax.nn.log_softmax(predictions.logits).reshape(2, 16, -1)
    ids = np.flatnonzero(token_mask(real_ids, log_probs.shape[-1]))
    assert len(ids) == num_ids(real_ids) < log_probs.shape[-1]
    shuffled = np.random.default_rng(0).permuted(np.tile(ids, (2, 16, 1)), axis=-1)
    known = CachedTargets(
        jnp.ones((2, 16), bool),
        jnp.asarray(shuffled),
        jnp.take_along_axis(log_probs, shuffled, axis=-1),
        jnp.full((2, 16), -1e30),  # of no other ids
    )
    cached = CachedTeacher("top_k", real_ids)

    def loss(teacher, teacher_params, batch):
        configs = DistillationConfig(), RouterLossConfig()
        fn = token_loss(Vlm(student), teacher, *configs, terms=("kd", "ce"), chunk_size=4)
        fn = jax.jit(jax.value_and_grad(fn, has_aux=True))
        return fn(params, {}, teacher_params, batch, jax.random.key(0))

    assert isinstance(live, Teacher) and isinstance(cached, Teacher)
    found = loss(cached, None, batch._replace(teacher=known))
    chex.assert_trees_all_close(found, loss(live, teacher_params, batch), atol=1e-5)


def test_tokens_without_targets_have_cross_entropy_only(tiny_architecture, random_batch):
    config = tiny_architecture("tiny")
    batch = random_batch(config, rows=2, length=16)
    known = np.array(batch.loss_mask)
    known[1] = False
    batch = jax.tree.map(jnp.asarray, batch._replace(teacher=CachedTargets(np.roll(known, -1, 1))))
    masks = loss_masks(batch, DistillationConfig(), ("kd", "ce"), config)
    assert masks["ce"][1].any() and not masks["kd"][1].any()
    np.testing.assert_array_equal(masks["kd"][0], masks["ce"][0])
