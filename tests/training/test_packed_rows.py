"""A step does not depend on which samples are in one row, in any stage and on any mesh."""

import dataclasses
import functools
import itertools

import chex
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from moddistill.config import PREFERENCE_KINDS, ExpertConfig, MeshConfig
from moddistill.distributed import sharding
from moddistill.distributed.sharding import make_mesh, put_batch
from moddistill.models.batch import concatenate_sides
from moddistill.models.vlm import Vlm
from moddistill.training.program import make_program
from moddistill.training.stages import STAGES
from tests.packed_rows import batch_of, preference_of, random_pairs, random_samples

EXPERTS = ExpertConfig(dispatch="capacity", capacity_factor=0.8)
CASES = [*(stage for stage in STAGES if stage != "preference"), "d2d images"]
CASES += [f"preference {kind}" for kind in PREFERENCE_KINDS]
ONE_DEVICE = MeshConfig(data=1)
MESHES = {
    "2x2x2x1": MeshConfig(data=2, fsdp=2, expert=2),
    "1x2x2x2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
MICRO_BATCHES = 2
PACKED_LENGTH, LENGTH = 48, 18
IMAGES = (6, 28)  # slots of a packed row, height


def packed_rows(samples, gap):
    """16 rows of three, two, one and no sample in turn, with padding before and between them."""
    rest = iter(samples)
    sizes = itertools.islice(itertools.cycle((3, 2, 1, 0)), 16)
    rows = [list(itertools.islice(rest, size)) for size in sizes]
    assert not list(rest)
    return [[gap, *row[:1], gap, *row[1:]] for row in rows]


def rows_apart(packed, samples):
    """Each sample in a row of its own, in the micro-batch and the order of its packed row.

    A micro-batch is every second row. One has fewer samples than the other, and rows of padding.
    """
    parts = []
    for part in range(MICRO_BATCHES):
        items = itertools.chain(*packed[part::MICRO_BATCHES])
        parts.append([[item] for item in items if any(item is sample for sample in samples)])
    most = -(-max(map(len, parts)) // 8) * 8
    parts = [part + [[]] * (most - len(part)) for part in parts]
    return [row for rows in zip(*parts, strict=True) for row in rows]


@pytest.fixture(scope="module")
def models(tiny_architecture, init):
    """`models(stage)`: student and teacher with their parameters; the teacher is far from it."""
    teacher = tiny_architecture("tiny-teacher")
    teacher_params = init(teacher, 1)
    teacher_params["decoder"]["norm"]["scale"] *= 8

    @functools.cache
    def make(stage):
        is_sparse = stage in ("sft", "d2s", "preference")
        student = tiny_architecture("tiny", EXPERTS if is_sparse else None)
        if not STAGES[stage].teacher:
            return student, init(student), None, None
        return student, init(student), teacher, teacher_params

    return make


@pytest.fixture(scope="module")
def batches(models):
    """`batches(stage)`: the same samples in packed rows, and in rows of their own."""

    @functools.cache
    def make(stage):
        student = models(stage)[0]
        is_preference = STAGES[stage].records == "preference"
        samples = (random_pairs if is_preference else random_samples)(student, 24)
        batch = preference_of if is_preference else batch_of
        packed = packed_rows(samples, gap=(2, 1) if is_preference else 2)
        apart = rows_apart(packed, samples)
        made = batch(packed, PACKED_LENGTH, IMAGES), batch(apart, LENGTH, (2, IMAGES[1]))
        return jax.tree.map(np.asarray, made)

    return make


@pytest.fixture(scope="module")
def first_step(tiny_config, models, batches):
    """`first_step(case, mesh, packed)`: gradients, updated parameters and metrics of a step."""

    def run(case, mesh, packed):
        stage, _, kind = case.partition(" ")
        config = tiny_config(
            stage,
            remat="none",
            grad_accum_steps=MICRO_BATCHES,
            logits_chunk_size=64,
            # The first moment is the gradient. A large eps, since Adam turns rounding errors of
            # tiny gradients into steps of size lr.
            optim={"b1": 0.0, "clip_norm": 0.0, "eps": 1e-2, "lr": 0.1, "warmup_ratio": 0.0},
            router={"z_weight": 0.02},
            data={"packing": packed},
        )
        if kind == "images":
            weights = {"image_kd_weight": 0.7, "relation_weight": 2.0}
            config = dataclasses.replace(
                config, distillation=dataclasses.replace(config.distillation, **weights)
            )
        elif kind:
            config = dataclasses.replace(
                config, preference=dataclasses.replace(config.preference, kind=kind, beta=0.5)
            )
        student, params, teacher, teacher_params = models(stage)
        mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == ONE_DEVICE else 8])
        with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
            program = make_program(config, student, teacher, mesh)
            state = jax.jit(program.make_state, out_shardings=program.state_shardings)(params)
            taught = jax.tree.map(
                lambda x, shape: jax.device_put(x.astype(shape.dtype), shape.sharding),
                teacher_params,
                program.teacher,
            )
            batch = put_batch(mesh, batches(stage)[0 if packed else 1])
            state, metrics = program.step(state, taught, batch)
        gradients = optax.tree.get(state.opt_state, "mu")
        return jax.device_get((gradients, state.params, metrics))

    return run


@pytest.fixture(scope="module")
def apart(first_step):
    return functools.cache(lambda case: first_step(case, ONE_DEVICE, packed=False))


def assert_close(found, expected):
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5, rtol=1e-5, err_msg=path)


def check(first_step, apart, case, mesh):
    gradients, params, metrics = first_step(case, mesh, packed=True)
    expected_gradients, expected_params, expected_metrics = apart(case)
    assert max(np.max(np.abs(x)) for x in expected_gradients.values()) > 1e-2
    assert_close(gradients, expected_gradients)
    assert_close(params, expected_params)
    assert expected_metrics["samples"] == (24, 1)
    assert expected_metrics.get("dropped", (1, 1))[0] > 0
    assert metrics["padding"][0] != expected_metrics["padding"][0]
    assert_close(metrics, expected_metrics | {"padding": metrics["padding"]})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_on_packed_rows_is_that_of_samples_in_rows_of_their_own(first_step, apart, case):
    check(first_step, apart, case, ONE_DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", [*STAGES, "d2d images"])
def test_step_on_packed_rows_is_the_same_on_every_mesh(first_step, apart, stage, mesh):
    case = "preference kto_pair" if stage == "preference" else stage
    check(first_step, apart, case, MESHES[mesh])


@pytest.mark.parametrize("stage", ["d2s", "preference"])
def test_experts_have_the_same_load(models, batches, stage):
    """In the first micro-batch, since the order of its tokens decides which are dropped."""
    student, params, _, _ = models(stage)

    @jax.jit
    def statistics(batch):
        batch = jax.tree.map(lambda x: x[::MICRO_BATCHES], batch)
        batch = batch if stage == "d2s" else concatenate_sides(batch)
        return Vlm(student).apply({"params": params}, batch).router

    packed, apart = map(statistics, batches(stage))
    assert np.min(apart.load.sum(axis=-1)) > 0 and np.min(apart.dropped) > 0
    chex.assert_trees_all_close(packed, apart, atol=1e-5, rtol=1e-5)
