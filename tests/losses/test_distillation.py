import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, ExpertConfig, RouterLossConfig
from moddistill.losses.distillation import loss_masks, token_loss
from moddistill.losses.divergences import divergence
from moddistill.models.batch import padded_batch
from moddistill.models.presets import preset
from moddistill.models.vlm import Vlm
from moddistill.params import flatten, merge
from moddistill.teachers.live import LiveTeacher

# A question of two tokens, an answer of one, its end, and two of padding.
TOY = padded_batch(
    jnp.array([[11, 12, 21, 2, 0, 0]]), jnp.array([4]), jnp.array([[0, 0, 1, 1, 0, 0]], bool)
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Positions 1 and 2 predict the answer and its end.
        (DistillationConfig(), [0, 1, 1, 0, 0, 0]),
        # The original code misses the answer's first token and takes what follows the end.
        (DistillationConfig(kd_shift="reference"), [0, 0, 1, 1, 0, 0]),
        # Every prediction of a real token; position 3 would predict padding.
        (DistillationConfig(kd_positions="all_tokens"), [1, 1, 1, 0, 0, 0]),
    ],
    ids=["correct", "reference", "all_tokens"],
)
def test_distilled_positions(config, expected):
    masks = loss_masks(TOY, config, ("kd", "ce"), preset("tiny"))
    np.testing.assert_array_equal(masks["kd"], [expected])
    np.testing.assert_array_equal(masks["ce"], [[0, 1, 1, 0, 0, 0]])


def test_answers_of_the_student_are_no_labels():
    """Of two equal rows, the second has the student's own answer."""
    both = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), TOY)
    batch = both._replace(on_policy=jnp.array([False, True]))
    masks = loss_masks(batch, DistillationConfig(), ("kd", "ce"), preset("tiny"))
    np.testing.assert_array_equal(masks["kd"], [[0, 1, 1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(masks["ce"], [[0, 1, 1, 0, 0, 0], [0] * 6])


@pytest.fixture(scope="module")
def setting(tiny_architecture, init, random_batch):
    """Student (dense or sparse) and teacher, both text-only, their parameters, and a batch.

    The teacher's logits are scaled up as training would: the KL of two nearly uniform distributions
    is a difference of nearly equal numbers, with fewer exact digits than the tests compare.
    """
    made = {}

    def make(kind):
        if kind not in made:
            moe = ExpertConfig() if kind == "sparse" else None
            names = ("tiny", moe), ("tiny-teacher", None)
            student, teacher = (
                dataclasses.replace(tiny_architecture(*name), vision=None) for name in names
            )
            batch = jax.tree.map(jnp.asarray, random_batch(student, rows=4, length=20))
            teacher_params = init(teacher, 1)
            teacher_params["decoder"]["norm"]["scale"] *= 8
            made[kind] = Vlm(student), Vlm(teacher), init(student, 0), teacher_params, batch
        return made[kind]

    return make


def direct(student, teacher, params, teacher_params, batch, config, router, terms):
    """The loss from all logits, position by position."""
    output = student.apply({"params": params}, batch)
    real = student.config.decoder.real_ids[-1][1]
    logits = Vlm.logits(output)[:, :-1, :real]
    target = Vlm.logits(teacher.apply({"params": teacher_params}, batch))[:, :-1, :real]
    logp, teacher_logp = jax.nn.log_softmax(logits), jax.nn.log_softmax(target)
    mask = batch.loss_mask[:, 1:]
    ce = -jnp.take_along_axis(logp, jnp.minimum(batch.tokens[:, 1:, None], real - 1), -1)[..., 0]
    if config.divergence == "forward_kl":
        kd = jnp.sum(jnp.exp(teacher_logp) * (teacher_logp - logp), -1)
    else:
        kd = divergence(logits, target, config)
    values = {"ce": ce, "kd": kd}
    means = {name: jnp.sum(values[name] * mask) / mask.sum() for name in terms}
    total = sum(means[name] * getattr(config, f"{name}_weight") for name in terms)
    if output.router is not None:
        stats = output.router
        first, prob = (x / stats.tokens[:, None] for x in (stats.first, stats.prob))
        balance = 4 * jnp.sum(first * prob)
        z = jnp.sum(stats.z / stats.tokens)
        total = total + router.load_balance_weight * balance + router.z_weight * z
    return total, means


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "terms", "options"),
    [
        ("dense", ("ce",), {}),
        ("dense", ("kd",), {}),
        ("dense", ("kd", "ce"), {}),
        ("sparse", ("kd", "ce"), {}),
        ("dense", ("kd",), {"divergence": "jsd", "temperature": 2.0}),
        ("sparse", ("kd", "ce"), {"divergence": "reverse_kl"}),
    ],
)
def test_token_loss_is_that_of_full_logits(setting, kind, terms, options):
    student, teacher, params, teacher_params, batch = setting(kind)
    config = DistillationConfig(kd_weight=0.7, ce_weight=1.3, **options)
    router = RouterLossConfig(z_weight=0.02)
    live = LiveTeacher(teacher) if "kd" in terms else None
    loss_fn = token_loss(student, live, config, router, terms=terms, chunk_size=8)
    trained = flatten(params)
    rng = jax.random.key(0)

    def plain(trained):
        return direct(
            student, teacher, merge(trained), teacher_params, batch, config, router, terms
        )

    ours = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (value, metrics), grads = ours(
        trained, {}, teacher_params if "kd" in terms else None, batch, rng
    )
    (expected, means), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(trained)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
    count = batch.loss_mask.sum()
    for name in terms:
        np.testing.assert_allclose(metrics[name], (means[name] * count, count), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (expected * count, count), rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_router_metrics(setting, kind):
    student, _, params, _, batch = setting(kind)
    configs = DistillationConfig(), RouterLossConfig()
    loss_fn = jax.jit(token_loss(student, None, *configs, terms=("ce",), chunk_size=256))
    metrics = loss_fn(flatten(params), {}, None, batch, jax.random.key(0))[1]
    if kind == "dense":
        assert set(metrics) == {"ce", "loss"}
        return
    total, weight = metrics["balance"]
    # Two expert layers; the metric is their mean, 1 when balanced and 4 when collapsed.
    assert 0.9 <= total / weight <= 4
    dropped, assignments = metrics["dropped"]
    tokens = np.sum(batch.segments > 0)
    np.testing.assert_array_equal([dropped, assignments], [0, 2 * 2 * tokens])


def test_padding_changes_nothing(setting):
    student, teacher, params, teacher_params, batch = setting("sparse")
    configs = DistillationConfig(kd_positions="all_tokens"), RouterLossConfig()
    loss = token_loss(student, LiveTeacher(teacher), *configs, terms=("kd", "ce"), chunk_size=256)
    loss_fn = jax.jit(loss)
    run = functools.partial(loss_fn, flatten(params), {}, teacher_params, rng=jax.random.key(0))
    noise = jnp.where(batch.segments > 0, batch.tokens, 7)
    ours, theirs = run(batch=batch)[0], run(batch=batch._replace(tokens=noise))[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
