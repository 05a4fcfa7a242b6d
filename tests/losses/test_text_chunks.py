"""Likelihoods of chunks, against all logits at once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.losses.chunked import LogitInputs, chunked_token_loss
from moddistill.losses.text_chunks import chunk_divergence, chunk_loss
from moddistill.models.batch import LAST, WITHIN, CachedTargets

B, T, WIDTH, VOCAB = 4, 16, 8, 22
# Two chunks of a row with a token between them, one over two positions that are not neighbours, a
# row without any, and a row that ends with one.
CHUNKS = {0: [[2, 3, 4], [6]], 1: [[3, 9]], 3: [[13, 14]]}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    chunk, logprobs = np.zeros((B, T), np.int8), np.zeros((B, T), np.float32)
    for row, chunks in CHUNKS.items():
        for positions in chunks:
            chunk[row, positions] = WITHIN
            chunk[row, positions[-1]] = LAST
            logprobs[row, positions[-1]] = -rng.exponential()
    known = jnp.asarray(rng.random((B, T)) < 0.3)
    inputs = LogitInputs(*(rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (B * T, VOCAB)))
    labels = rng.integers(0, VOCAB, B * T).astype(np.int32)
    targets = CachedTargets(known, chunk=jnp.asarray(chunk), chunk_logprobs=jnp.asarray(logprobs))
    return jax.tree.map(jnp.asarray, inputs), jnp.asarray(labels), targets


def plain(inputs, labels, targets):
    log_q = jax.nn.log_softmax(inputs.hidden @ inputs.head.T)
    log_q = jnp.take_along_axis(log_q, labels[:, None], axis=1).reshape(B, T)
    total = 0.0
    for row, chunks in CHUNKS.items():
        for positions in chunks:
            p = jnp.exp(targets.chunk_logprobs[row, positions[-1]])
            q = jnp.exp(sum(log_q[row, i] for i in positions))
            total += p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)], ids=["1", "2x4"])
def test_chunks_have_the_divergence_of_their_likelihoods(arrays, mesh):
    inputs, labels, targets = arrays

    def chunked(inputs, labels, targets):
        token_sum = functools.partial(
            chunked_token_loss, labels=labels, chunk_size=3, real_ids=((0, VOCAB),)
        )
        loss, total = chunk_loss(
            token_sum, inputs, targets.chunk, targets.chunk_logprobs, jnp.float32(0.5)
        )
        return loss, total

    def both(fn, **kwargs):
        return jax.jit(jax.value_and_grad(lambda x: fn(x, labels, targets), **kwargs))(inputs)

    value, gradient = both(plain)
    if mesh is None:
        (loss, total), found = both(chunked, has_aux=True)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            (loss, total), found = jax.device_get(both(chunked, has_aux=True))
    np.testing.assert_allclose([loss, total], [value / 2, value], rtol=1e-5)
    half = jax.tree.map(lambda x: np.asarray(x) / 2, gradient)
    chex.assert_trees_all_close(jax.device_get(found), half, atol=1e-5, rtol=1e-5)


def test_certain_chunks_have_a_finite_divergence_and_gradient():
    certain, unlikely = jnp.float32(0.0), jnp.float32(-80.0)
    fn = jax.value_and_grad(chunk_divergence)
    for student in (certain, unlikely):
        for teacher in (certain, unlikely):
            value, gradient = fn(student, teacher)
            assert np.isfinite(value) and np.isfinite(gradient)
            assert (value == 0) == (student == teacher)
