import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moddistill.config import DistillationConfig, RouterLossConfig
from moddistill.losses import Loss
from moddistill.losses.distillation import token_loss
from moddistill.models.batch import Batch, PreferenceBatch
from moddistill.models.presets import preset
from moddistill.models.vlm import Vlm
from moddistill.params import flatten
from moddistill.teachers.live import LiveTeacher
from moddistill.training.state import State
from moddistill.training.step import content_metrics, make_step

TEXT = preset("demo-language")
NO_MEAN = np.float32("nan")


def squares_share(params, frozen, teacher, batch, totals, rng):
    """Mean squared error over the positions of a mask, with a little noise.

    The batch has numbers x in the place of tokens, and y in that of positions.
    """
    noise = 1e-3 * jax.random.normal(rng, ())
    error = batch.tokens * params["slope"] + frozen["offset"] + noise - batch.positions
    value = jnp.sum(batch.loss_mask * error**2)
    return value / totals["mask"], {"loss": (value, jnp.sum(batch.loss_mask))}


squares = Loss(lambda batch: {"mask": jnp.sum(batch.loss_mask)}, squares_share)


def batch_of(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows, 3)).astype(np.float32)
    # From 1 to 3 supervised positions a row, so that micro-batches weigh differently.
    mask = (np.arange(3)[None] <= (np.arange(rows) * 3 // rows)[:, None]).astype(np.float32)
    segments = np.ones((rows, 3), np.int32)
    segments[0, 2] = 0
    return Batch(tokens=x, positions=y, segments=segments, loss_mask=mask)


def state_of(optimizer):
    params = {"slope": jnp.float32(0.5)}
    frozen = {"offset": jnp.float32(0.25)}
    return State(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), NO_MEAN)


def run(optimizer, steps=1, accumulate=1, seed=0):
    step = jax.jit(make_step(squares, optimizer, accumulate, seed, TEXT))
    state = state_of(optimizer)
    for number in range(steps):
        state, metrics = step(state, None, batch_of(seed=number))
    return state, metrics


def test_step_equals_one_computed_by_hand():
    """Gradient of the mean over supervised positions, its norm, and the update."""
    batch = batch_of()
    noise = 1e-3 * jax.random.normal(jax.random.fold_in(jax.random.key(3), 0), ())
    error = batch.tokens * 0.5 + 0.25 + float(noise) - batch.positions
    weight = batch.loss_mask.sum()
    slope = 2 * np.sum(batch.loss_mask * error * batch.tokens) / weight
    state, metrics = run(optax.sgd(0.1), seed=3)
    np.testing.assert_allclose(state.params["slope"], 0.5 - 0.1 * slope, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], (abs(slope), 1), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], (abs(0.5 - 0.1 * slope), 1), rtol=1e-5)
    loss = np.sum(batch.loss_mask * error**2)
    np.testing.assert_allclose(metrics["loss"], (loss, weight), rtol=1e-5)
    np.testing.assert_array_equal(metrics["tokens"], (23, 1))
    assert state.step == 1


def test_content_of_a_step_by_hand():
    """Two rows of 6 positions: samples of 2 and 3 tokens with padding between them, and padding."""
    batch = Batch(
        tokens=jnp.ones((2, 6), jnp.int32),
        positions=jnp.asarray([[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
        segments=jnp.asarray([[1, 1, 0, 3, 3, 3], [0] * 6]),
        loss_mask=jnp.asarray([[0, 1, 0, 0, 1, 1], [0] * 6], bool),
    )
    expected = {
        "tokens": (5, 1),
        "squared_lengths": (4 + 9, 1),
        "images": (0, 1),
        "samples": (2, 1),
        "padding": (7, 12),
        "supervised": (3, 5),
    }
    assert content_metrics(batch, TEXT) == expected
    both = content_metrics(PreferenceBatch(batch, batch), TEXT)
    assert both["samples"] == (2, 1)
    assert (both["tokens"], both["padding"], both["supervised"]) == ((10, 1), (14, 24), (6, 10))


def test_randomness_is_that_of_seed_and_step():
    optimizer = optax.sgd(0.1)
    slope = {seed: run(optimizer, steps=2, seed=seed)[0].params["slope"] for seed in (0, 1)}
    assert slope[0] == run(optimizer, steps=2, seed=0)[0].params["slope"]
    assert slope[0] != slope[1]
    step = jax.jit(make_step(squares, optax.sgd(0.0), 1, 0, TEXT))
    state, first = step(state_of(optax.sgd(0.0)), None, batch_of())
    _, second = step(state, None, batch_of())
    assert first["loss"][0] != second["loss"][0]


def test_clipping_bounds_the_update_and_not_the_reported_norm():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state, metrics = run(optimizer)
    np.testing.assert_allclose(abs(state.params["slope"] - 0.5), 1e-3, rtol=1e-4)
    assert metrics["grad_norm"][0] > 0.01


def test_frozen_parameters_stay_as_they_are():
    state, _ = run(optax.adamw(0.1, weight_decay=0.1), steps=3)
    assert state.frozen["offset"] == 0.25
    assert state.params["slope"] != 0.5


def test_step_is_traced_once():
    optimizer = optax.adamw(optax.linear_schedule(0.1, 0.0, 10))
    step = chex.assert_max_traces(make_step(squares, optimizer, 2, 0, TEXT), n=1)
    step = jax.jit(step, donate_argnums=0)
    state = state_of(optimizer)
    for number in range(3):
        state, _ = step(state, None, batch_of(seed=number))
    assert state.step == 3


def test_state_can_be_donated():
    """Nothing of the old state is needed for the new one."""
    optimizer = optax.adamw(0.1)
    step = jax.jit(make_step(squares, optimizer, 1, 0, TEXT), donate_argnums=0)
    old = state_of(optimizer)
    new, _ = step(old, None, batch_of())
    assert old.params["slope"].is_deleted()
    expected, _ = run(optimizer)
    assert new.params["slope"] == expected.params["slope"]


@pytest.fixture(scope="module")
def language_model(tiny_architecture, init, random_batch):
    """A dense model without a tower, its parameters, and eight rows that weigh differently."""
    config = dataclasses.replace(tiny_architecture(), vision=None)
    batch = jax.tree.map(jnp.asarray, random_batch(config, rows=8, length=16))
    counts = batch.loss_mask.sum(axis=1)
    assert len(set(np.asarray(counts.reshape(4, 2).sum(axis=1)))) > 1
    return Vlm(config), init(config), batch


@pytest.mark.slow
@pytest.mark.parametrize("terms", [("ce",), ("kd", "ce")])
def test_accumulation_gives_the_same_step(language_model, init, terms):
    """Token means are those of the whole batch, whatever the number of micro-batches.

    KL at all tokens and cross entropy at the answers are means over different numbers of them.
    """
    model, params, batch = language_model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    config = DistillationConfig(kd_positions="all_tokens")
    loss = token_loss(
        model, LiveTeacher(model), config, RouterLossConfig(), terms=terms, chunk_size=16
    )
    teacher = init(model.config, seed=1)
    trained = flatten(params)
    results = []
    for accumulate in (1, 2, 4):
        state = State(jnp.zeros((), jnp.int32), trained, {}, optimizer.init(trained), NO_MEAN)
        step = jax.jit(make_step(loss, optimizer, accumulate, 0, model.config))
        state, metrics = step(state, teacher, batch)
        names = ("loss", *terms, "grad_norm", "tokens")
        results.append((state.params, [metrics[name] for name in names]))
    moved = jax.tree.map(
        lambda new, old: float(jnp.max(jnp.abs(new - old))), results[0][0], trained
    )
    assert max(moved.values()) > 1e-2
    for other in results[1:]:
        chex.assert_trees_all_close(other[0], results[0][0], atol=1e-6, rtol=0)
        chex.assert_trees_all_close(other[1:], results[0][1:], rtol=1e-5)
