import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moddistill.config import MeshConfig, TrainConfig
from moddistill.distributed.sharding import BATCH_AXES, make_mesh
from moddistill.losses.chunked import LogitInputs, chunked_token_loss
from moddistill.losses.divergences import cross_entropy, divergence
from moddistill.models.logits import masked_logits
from moddistill.models.vocabulary import token_mask
from moddistill.teachers.targets import NO_TARGETS, Targets

POSITIONS, WIDTH, TEACHER_WIDTH, VOCAB, TEACHER_VOCAB = 37, 8, 12, 22, 25
REAL = ((0, 7), (8, 20))  # `<image>` is 7
IDS = np.flatnonzero(token_mask(REAL, VOCAB))


class Heads(NamedTuple):
    """Final hidden states and heads of a student and of a live teacher."""

    hidden: Any
    head: Any
    teacher_hidden: Any
    teacher_head: Any


def kd_and_ce(logits, targets, labels):
    teacher_logits = masked_logits(targets.per_position, targets.shared, REAL)
    kd = divergence(logits, teacher_logits[:, : logits.shape[1]])
    return {"kd": kd, "ce": cross_entropy(logits, labels)}


def ce_only(logits, _, labels):
    return {"ce": cross_entropy(logits, labels)}


def token_loss(heads, labels, weights, token_fn=kd_and_ce, chunk=8, real_ids=REAL):
    inputs, targets = LogitInputs(*heads[:2]), Targets(*heads[2:])
    return chunked_token_loss(
        token_fn, inputs, labels, weights, targets, chunk_size=chunk, real_ids=real_ids
    )


def arrays(share, seed=0):
    """Heads of a student and a wider teacher with more padding rows, labels, weights."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    heads = Heads(
        normal(POSITIONS, WIDTH),
        normal(VOCAB, WIDTH),
        normal(POSITIONS, TEACHER_WIDTH),
        normal(TEACHER_VOCAB, TEACHER_WIDTH),
    )
    labels = jnp.asarray(rng.choice(IDS, POSITIONS), jnp.int32)
    chosen = rng.permutation(POSITIONS) < round(share * POSITIONS)
    weights = {
        name: jnp.asarray(chosen * rng.uniform(0.1, 1.0, POSITIONS), jnp.float32)
        for name in ("kd", "ce")
    }
    return heads, labels, weights


def plain(heads, labels, weights):
    """The same sum from all logits at once, vocabularies cut to the real ids."""
    student = jax.nn.log_softmax((heads.hidden @ heads.head.T)[:, IDS])
    teacher = jax.nn.log_softmax((heads.teacher_hidden @ heads.teacher_head.T)[:, IDS])
    kd = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    ce = -jnp.sum((labels[:, None] == IDS[None]) * student, axis=-1)
    return jnp.sum(weights["kd"] * kd + weights["ce"] * ce)


@functools.partial(jax.jit, static_argnames=("chunk", "token_fn"))
def chunked(heads, labels, weights, chunk=8, token_fn=kd_and_ce):
    return token_loss(heads, labels, weights, token_fn, chunk)[0]


def gradients(fn, heads, *rest):
    """Value, and gradients by the student's hidden states and head."""

    def of_student(hidden, head):
        return fn(heads._replace(hidden=hidden, head=head), *rest)

    return jax.jit(jax.value_and_grad(of_student, (0, 1)))(heads.hidden, heads.head)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("chunk", [1, 8, 10, 37, 64])
def test_value_and_gradients_are_those_of_full_logits(chunk, share):
    inputs = arrays(share)
    ours = gradients(functools.partial(chunked, chunk=chunk), *inputs)
    theirs = gradients(plain, *inputs)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_values_are_at_their_positions():
    heads, labels, weights = arrays(share=0.4)
    _, values = token_loss(heads, labels, weights)
    logp = jax.nn.log_softmax((heads.hidden @ heads.head.T)[:, IDS])
    expected = -np.asarray(logp)[np.arange(POSITIONS), np.searchsorted(IDS, labels)]
    np.testing.assert_allclose(values["ce"], np.where(weights["ce"] != 0, expected, 0.0), atol=1e-5)


def test_weights_of_two_terms_may_cover_different_positions():
    heads, labels, weights = arrays(share=1.0)
    even = jnp.arange(POSITIONS) % 2
    weights = {"kd": weights["kd"] * even, "ce": weights["ce"] * (1 - even)}
    chex.assert_trees_all_close(
        gradients(chunked, heads, labels, weights),
        gradients(plain, heads, labels, weights),
        atol=1e-5,
    )


def test_gradient_is_scaled_by_what_follows():
    heads, labels, weights = arrays(share=0.5)
    once = gradients(chunked, heads, labels, weights)[1]
    thrice = gradients(lambda *args: 3 * chunked(*args), heads, labels, weights)[1]
    chex.assert_trees_all_close(thrice, jax.tree.map(lambda x: 3 * x, once), rtol=1e-6)


def test_frozen_head_gives_the_same_gradient_of_hidden_states():
    heads, labels, weights = arrays(share=0.5)
    single = jax.grad(lambda x: chunked(heads._replace(hidden=x), labels, weights))(heads.hidden)
    both = gradients(chunked, heads, labels, weights)[1][0]
    np.testing.assert_allclose(single, both, atol=1e-6)


def test_padded_vocabulary_has_no_probability_and_no_gradient():
    heads, labels, weights = arrays(share=1.0)
    probs = jax.nn.softmax(masked_logits(heads.hidden, heads.head, REAL))
    assert not np.any(np.delete(probs, IDS, axis=1))
    d_head = gradients(chunked, heads, labels, weights)[1][1]
    assert np.all(np.any(d_head[IDS], axis=1))
    assert not np.any(np.delete(d_head, IDS, axis=0))


def test_padding_rows_do_not_change_the_loss():
    heads, labels, weights = arrays(share=1.0)
    other = heads._replace(
        head=jnp.full_like(heads.head, 50.0).at[IDS].set(heads.head[IDS]),
        teacher_head=jnp.full_like(heads.teacher_head, -50.0).at[IDS].set(heads.teacher_head[IDS]),
    )
    assert chunked(other, labels, weights) == chunked(heads, labels, weights)


def test_unsupervised_positions_have_exactly_no_gradient():
    heads, labels, weights = arrays(share=0.25)
    d_hidden = gradients(chunked, heads, labels, weights)[1][0]
    np.testing.assert_array_equal(np.any(d_hidden, axis=1), weights["ce"] != 0)


def test_teacher_gets_no_gradient():
    heads, labels, weights = arrays(share=1.0)
    d_heads = jax.grad(lambda heads: chunked(heads, labels, weights), allow_int=True)(heads)
    assert np.any(d_heads.hidden)
    assert not np.any(d_heads.teacher_hidden)
    assert not np.any(d_heads.teacher_head)


def shapes_within(jaxpr):
    """Shapes of all values of a jaxpr, those inside loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in (*equation.invars, *equation.outvars))
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_within(inner)


@pytest.mark.parametrize(("fn", "expected"), [(chunked, False), (plain, True)])
def test_no_array_of_positions_by_vocabulary_exists(fn, expected):
    heads, labels, weights = arrays(share=1.0)
    jaxpr = jax.make_jaxpr(lambda *args: gradients(fn, *args))(heads, labels, weights).jaxpr
    shapes = set(shapes_within(jaxpr))
    full = {s for s in shapes if len(s) >= 2 and s[0] >= POSITIONS and max(s[1:]) >= len(IDS)}
    assert bool(full) == expected


def test_memory_at_full_size():
    """2,048 positions, 151,936 ids, widths 896 and 3,584: at most 0.7 GiB of temporary memory."""
    positions, vocab, width, teacher_width = 2048, 151_936, 896, 3584

    def shape(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype)

    heads = Heads(
        shape(positions, width),
        shape(vocab, width),
        shape(positions, teacher_width),
        shape(vocab, teacher_width),
    )
    labels = shape(positions, dtype=jnp.int32)
    weights = {"kd": shape(positions), "ce": shape(positions)}
    chunk = TrainConfig().logits_chunk_size

    def loss(hidden, head, heads, labels, weights):
        heads = heads._replace(hidden=hidden, head=head)
        real_ids = ((0, vocab - 290),)

        def token_fn(logits, targets, labels):
            teacher_logits = masked_logits(targets.per_position, targets.shared, real_ids)
            return {"kd": divergence(logits, teacher_logits), "ce": cross_entropy(logits, labels)}

        return token_loss(heads, labels, weights, token_fn, chunk, real_ids)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*heads[:2], heads, labels, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.7 * 2**30


def test_cross_entropy_needs_no_targets():
    heads, labels, weights = arrays(share=0.5)
    weights = {"ce": weights["ce"]}
    inputs = LogitInputs(*heads[:2])
    value, _ = chunked_token_loss(
        ce_only, inputs, labels, weights, NO_TARGETS, chunk_size=8, real_ids=REAL
    )
    zero = {"ce": weights["ce"], "kd": jnp.zeros(POSITIONS)}
    np.testing.assert_allclose(value, plain(heads, labels, zero), rtol=1e-5)


def test_sharded_heads_are_gathered_before_the_loop_over_chunks():
    """One gather of each head and no collective inside of the loop, on 2 x 2 x 2 devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def shape(*size, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

    rows, head = PartitionSpec(BATCH_AXES), PartitionSpec("tensor", "fsdp")
    heads = Heads(
        shape(64, WIDTH, spec=rows),
        shape(VOCAB, WIDTH, spec=head),
        shape(64, TEACHER_WIDTH, spec=rows),
        shape(TEACHER_VOCAB + 1, TEACHER_WIDTH, spec=head),
    )
    weight = shape(64, spec=rows)
    labels = shape(64, spec=rows, dtype=jnp.int32)

    def loss(hidden, head, heads, labels, weights):
        heads = heads._replace(hidden=hidden, head=head)
        return token_loss(heads, labels, weights, chunk=4)[0]

    places = (heads.hidden.sharding, heads.head.sharding)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=places)
        weights = {"kd": weight, "ce": weight}
        program = gradient.lower(heads.hidden, heads.head, heads, labels, weights).compile()
    inside, outside = program.as_text().split("ENTRY ")
    assert "while(" in outside
    collective = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(")
    assert "all-gather" in {kind for kind, _ in collective.findall(outside)}
    assert not collective.findall(inside)


def test_supervised_positions_are_sharded_round_robin_over_tensor():
    """Eight at the end of 32, on four devices: two for each, one chunk of two."""
    chunks = []

    def token_fn(logits, _, labels):
        place = jax.lax.axis_index("tensor")
        jax.debug.callback(
            lambda place, labels: chunks.append((int(place), *labels)), place, labels
        )
        return {"ce": cross_entropy(logits, labels)}

    rng = np.random.default_rng(0)
    inputs = LogitInputs(
        *(jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32) for n in (64, VOCAB))
    )
    labels = jnp.arange(64, dtype=jnp.int32) % 32
    weights = {"ce": (labels >= 24).astype(jnp.float32)}
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        real_ids = ((0, VOCAB),)
        loss = jax.jit(lambda *x: chunked_token_loss(token_fn, *x, chunk_size=2, real_ids=real_ids))
        total, values = jax.block_until_ready(loss(inputs, labels, weights))
    jax.effects_barrier()
    assert sorted(chunks) == sorted(2 * [(i, 24 + i, 28 + i) for i in range(4)])
    expected, in_order = chunked_token_loss(
        ce_only, inputs, labels, weights, chunk_size=64, real_ids=real_ids
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(values["ce"], in_order["ce"], rtol=1e-5)
