"""Losses against a teacher that is not run: top-k log-probabilities, as a cache would have them.

`losses/` contains nothing about such a teacher, nor about a live one.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, MeshConfig, RouterLossConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.losses.chunked import LogitInputs, chunked_token_loss
from moddistill.losses.distillation import token_loss
from moddistill.losses.divergences import divergence
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import num_ids, token_mask
from moddistill.params import flatten
from moddistill.teachers.live import LiveTeacher
from moddistill.teachers.targets import Targets, Teacher

POSITIONS, WIDTH, VOCAB, TOP_K = 64, 8, 22, 5
REAL = ((0, 7), (8, 20))
IDS = np.flatnonzero(token_mask(REAL, VOCAB))


@dataclasses.dataclass(frozen=True, eq=False)
class CachedTeacher:
    """A teacher with the log-probabilities of some ids at each position, all others impossible."""

    ids: jax.Array
    log_probs: jax.Array
    real_ids: tuple

    def targets(self, params, batch, student):
        return Targets({"ids": self.ids, "log_probs": self.log_probs})

    def logits(self, targets, real_ids):
        ids, log_probs = targets.per_position["ids"], targets.per_position["log_probs"]
        logits = jnp.full((len(ids), real_ids[-1][1]), -1e30)
        return jnp.put_along_axis(logits, ids, log_probs, axis=1, inplace=False)


@pytest.fixture(scope="module")
def arrays():
    """Inputs of a student's logits, a cache, labels, weights of a quarter of the positions."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = np.stack([rng.choice(IDS, TOP_K, replace=False) for _ in range(POSITIONS)])
    teacher = CachedTeacher(jnp.asarray(ids), jax.nn.log_softmax(normal(POSITIONS, TOP_K)), REAL)
    supervised = rng.permutation(POSITIONS) < POSITIONS // 4
    weights = jnp.asarray(supervised * rng.uniform(0.1, 1.0, POSITIONS), jnp.float32)
    return LogitInputs(normal(POSITIONS, WIDTH), normal(VOCAB, WIDTH)), teacher, weights


def chunked(inputs, teacher, weights):
    def token_fn(logits, targets, labels):
        teacher_logits = teacher.logits(targets, REAL)
        return {"kd": divergence(logits[:, : teacher_logits.shape[1]], teacher_logits)}

    return chunked_token_loss(
        token_fn,
        inputs,
        jnp.zeros(POSITIONS, jnp.int32),
        {"kd": weights},
        teacher.targets(None, None, None),
        chunk_size=3,
        real_ids=REAL,
    )[0]


def plain(inputs, teacher, weights):
    """`sum_t w_t sum_k p_tk (log p_tk - log q_t[id_tk])`, from all of the student's logits."""
    log_q = jax.nn.log_softmax((inputs.hidden @ inputs.head.T)[:, IDS])
    log_q = jnp.take_along_axis(log_q, jnp.searchsorted(IDS, teacher.ids), axis=1)
    kl = jnp.sum(jnp.exp(teacher.log_probs) * (teacher.log_probs - log_q), axis=1)
    return jnp.sum(weights * kl)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)], ids=["1", "2x4"])
def test_kl_to_cached_log_probabilities_is_that_of_full_logits(arrays, mesh):
    inputs, teacher, weights = arrays

    def value_and_gradients(fn):
        return jax.jit(jax.value_and_grad(lambda inputs: fn(inputs, teacher, weights)))(inputs)

    expected = value_and_gradients(plain)
    if mesh is None:
        found = value_and_gradients(chunked)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.device_get(value_and_gradients(chunked))
    assert expected[0] > 1
    chex.assert_trees_all_close(found, jax.device_get(expected), atol=1e-5, rtol=1e-5)


def test_cache_of_all_ids_gives_the_loss_of_the_live_teacher(tiny_architecture, init, random_batch):
    student, teacher = (
        dataclasses.replace(tiny_architecture(name), vision=None)
        for name in ("tiny", "tiny-teacher")
    )
    batch = jax.tree.map(jnp.asarray, random_batch(student, rows=2, length=16))
    params, teacher_params = flatten(init(student, 0)), init(teacher, 1)
    live = LiveTeacher(Vlm(teacher))
    real_ids = teacher.decoder.real_ids
    output = Vlm(teacher).apply({"params": teacher_params}, batch)
    log_probs = jax.nn.log_softmax(
        live.logits(live.targets(teacher_params, batch, output), real_ids)
    )
    ids = jnp.asarray(np.flatnonzero(token_mask(real_ids, log_probs.shape[1])))
    assert len(ids) == num_ids(real_ids) < log_probs.shape[1]
    shuffled = np.random.default_rng(0).permuted(np.tile(ids, (len(log_probs), 1)), axis=1)
    cached = CachedTeacher(
        jnp.asarray(shuffled), jnp.take_along_axis(log_probs, shuffled, axis=1), real_ids
    )

    def loss(teacher, teacher_params):
        configs = DistillationConfig(), RouterLossConfig()
        fn = token_loss(Vlm(student), teacher, *configs, terms=("kd", "ce"), chunk_size=4)
        fn = jax.jit(jax.value_and_grad(fn, has_aux=True))
        return fn(params, {}, teacher_params, batch, jax.random.key(0))

    assert isinstance(live, Teacher) and isinstance(cached, Teacher)
    chex.assert_trees_all_close(loss(cached, None), loss(live, teacher_params), atol=1e-5)
