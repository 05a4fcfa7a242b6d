import bisect
import dataclasses
import importlib
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import common, llava_mod
from moddistill.config import MeshConfig, RecipeConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed.sharding import RULES, make_mesh
from moddistill.models.presets import PRESETS
from moddistill.planning import planner
from moddistill.training.program import make_program, with_shardings
from moddistill.training.stages import stage_of

STAGES = ("sft", "init", "d2d", "d2s", "preference")


def config_of(stage, arg=None):
    values = importlib.import_module(f"experiments.{stage}").get_config(arg)
    return from_config_dict(TrainConfig, values.to_dict())


def recipe_of(arg=None):
    return from_config_dict(RecipeConfig, llava_mod.get_config(arg).to_dict())


@pytest.mark.parametrize(
    ("stage", "lr"),
    [("init", 1e-4), ("d2d", 2e-5), ("d2s", 2e-5), ("preference", 2e-6), ("sft", 2e-5)],
)
def test_settings_of_the_paper(stage, lr):
    config = config_of(stage)
    assert (config.stage, config.optim.lr) == (stage, lr)
    assert (config.steps, config.epochs) == (0, 1)
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.98)
    assert (config.optim.warmup_ratio, config.optim.weight_decay) == (0.03, 0)
    assert (config.data.max_length, config.dtype) == (2048, "bfloat16")
    assert (config.data.packing, config.data.max_images) == (True, 16)
    assert (config.trainable, config.data.template) == ("paper", "vicuna")


def lengths(patches, count=20_480):
    """Lengths of LLaVA-like samples: an image and text with median 90, 95th percentile 500."""
    spread = math.log(500 / 90) / statistics.NormalDist().inv_cdf(0.95)
    texts = np.random.default_rng(0).lognormal(math.log(90), spread, count)
    return patches + np.rint(texts).astype(int)


def samples_per_row(lengths, max_length, window=1024):
    """Average number of samples in a row, by best fit within windows, the longest first."""
    rows = 0
    for start in range(0, len(lengths), window):
        free = []  # of the rows of this window, sorted
        found = np.minimum(lengths[start : start + window], max_length)
        for length in sorted(found.tolist(), reverse=True):
            best = bisect.bisect_left(free, length)
            rows += best == len(free)
            left = free.pop(best) if best < len(free) else max_length
            bisect.insort(free, left - length)
    return len(lengths) / rows


@pytest.mark.parametrize(
    ("models", "patches"), [(common.presets(), 576), (common.PAIRS["interleave"], 729)]
)
def test_samples_in_a_row_are_those_of_a_best_fit(models, patches):
    found = samples_per_row(lengths(patches), models.max_length)
    assert found == pytest.approx(models.samples_per_row, abs=0.02)


@pytest.mark.parametrize(
    ("models", "patches"), [(common.presets(), 576), (common.PAIRS["interleave"], 729)]
)
def test_pairs_in_a_row_are_between_answers_of_equal_and_of_independent_lengths(models, patches):
    one, other = np.split(lengths(patches, 40_960), 2)
    equal = samples_per_row(one, models.max_length)
    independent = samples_per_row(np.maximum(one, other), models.max_length)
    assert (equal + independent) / 2 == pytest.approx(models.pairs_per_row, abs=0.02)


def test_three_captions_fit_a_row():
    """Of up to 106 tokens each, with their question and the template."""
    assert samples_per_row(np.full(1023, 576 + 106), 2048) == 3


@pytest.mark.parametrize(
    ("stage", "arg", "samples", "per_row"),
    [
        ("init", None, 512, 3),
        ("teacher_init", None, 256, 3),
        ("sft", None, 128, 2.56),
        ("d2d", None, 256, 2.56),
        ("d2d", "pair=interleave", 256, 2.20),
        ("d2s", None, 256, 2.56),
        ("d2s", "pair=interleave", 256, 2.20),
        ("preference", None, 256, 2.42),
        ("preference", "pair=interleave", 256, 2.09),
    ],
)
def test_rows_of_a_step_hold_the_samples_of_the_paper(stage, arg, samples, per_row):
    """On average, to within a sixteenth; their number divides over 16 devices."""
    rows = config_of(stage, arg).batch_size
    assert rows % 16 == 0
    assert rows * per_row == pytest.approx(samples, rel=1 / 16)


def test_first_stage_of_a_teacher_is_that_of_llava():
    """It differs from the student's in rate, batch and template, and makes what `sft` reads."""
    ours, student = config_of("teacher_init", "student=qwen1.5-7b"), config_of("init")
    assert (ours.stage, ours.optim.lr, ours.data.template) == ("init", 1e-3, "plain")
    assert ours.data.sources == student.data.sources
    changed = dataclasses.replace(
        ours,
        student=student.student,
        batch_size=student.batch_size,
        data=student.data,
        optim=student.optim,
    )
    assert changed == student
    assert ours.student == "models/qwen1.5-7b"
    assert config_of("sft", "student=qwen1.5-7b").student == "runs/qwen1.5-7b/init/model"


def test_losses_and_experts_of_the_paper():
    moe, config = config_of("d2s").moe, config_of("preference")
    assert (moe.num_experts, moe.top_k, moe.placement) == (4, 2, "sparse")
    assert dataclasses.astuple(config.preference) == ("kto_pair", 0.1, 0)
    distillation = config.distillation
    assert (distillation.kd_positions, distillation.kd_shift) == ("response", "correct")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["demo", "tiny"])
def test_smaller_sizes(stage, size):
    assert config_of(stage, size).stage == stage


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_the_models(name):
    config = config_of("d2s", f"student={name},teacher={name}")
    assert config.student == f"runs/{name}/d2d/model"
    assert config.teacher == f"runs/{name}/sft/model"
    assert config_of("init", f"student={name}").student == f"models/{name}"


@pytest.mark.parametrize(
    ("stage", "student"),
    [
        ("d2d", "llava-hf/llava-interleave-qwen-0.5b-hf"),
        ("sft", "llava-hf/llava-interleave-qwen-0.5b-hf"),
        ("d2s", "runs/llava-interleave-qwen-0.5b-hf/d2d/model"),
        ("preference", "runs/llava-interleave-qwen-0.5b-hf/d2s/model"),
    ],
)
def test_interleave_pair_starts_from_published_models(stage, student):
    config = config_of(stage, "pair=interleave")
    teacher = "" if stage == "sft" else "llava-hf/llava-interleave-qwen-7b-hf"
    assert (config.student, config.teacher) == (student, teacher)


@pytest.mark.parametrize(
    ("stage", "student"),
    [
        ("init", "models/qwen2-0.5b"),
        ("d2d", "runs/long-llava/qwen2-0.5b/init/model"),
        ("d2s", "runs/long-llava/qwen2-0.5b/d2d/model"),
        ("preference", "runs/long-llava/qwen2-0.5b/d2s/model"),
    ],
)
def test_long_llava_pair_trains_the_projector_of_its_student_first(stage, student):
    config = config_of(stage, "pair=long-llava")
    teacher = "" if stage == "init" else "aws-prototyping/long-llava-qwen2-7b"
    assert (config.student, config.teacher) == (student, teacher)


@pytest.mark.parametrize("name", common.PAIRS)
@pytest.mark.parametrize("stage", ["d2d", "d2s", "preference"])
def test_a_pair_changes_models_and_format_only(stage, name):
    """Records are the paper's, in the teacher's template, with at least as much room for text."""
    ours, paper = config_of(stage, f"pair={name}"), config_of(stage)
    assert ours.data.template == "chatml"
    student, _ = planner.architectures(ours)
    assert ours.data.max_length - student.vision.patches >= 2048 - 576
    same = {name: getattr(paper, name) for name in ("student", "teacher", "batch_size", "data")}
    assert dataclasses.replace(ours, **same) == paper
    assert ours.data.sources == paper.data.sources


def test_interleave_pair_has_no_stage_init():
    with pytest.raises(ValueError, match=r"stage init: expected a student .*, got 'llava-hf/"):
        config_of("init", "pair=interleave")
    assert recipe_of("pair=interleave").order == ("d2d", "d2s", "preference")
    assert recipe_of("pair=long-llava").order == ("init", "d2d", "d2s", "preference")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("dmeo", r"argument: expected one of 'full', .*, got 'dmeo' \(did you mean 'demo'\?\)"),
        ("student=qwen2-0.5", r"preset: .*, got 'qwen2-0\.5' .*did you mean 'qwen2-0\.5b'"),
        ("studnet=tiny", r"experiment argument: expected one of .*, got 'studnet=tiny'"),
        (
            "tiny,student=qwen2-0.5b",
            r"'tiny' by itself, since it .*, got 'tiny,student=qwen2-0\.5b'",
        ),
        (
            "student=tiny,teacher=tiny,demo",
            r"expected 'demo' by itself, .*, got 'student=tiny,teac",
        ),
        ("pair=interleav", r"argument pair: .*, got 'interleav' \(did you mean 'interleave'\?\)"),
        ("pair=", r"expected one of .*'pair=interleave', 'pair=long-llava', got 'pair='"),
        ("demo,pair=interleave", r"expected 'demo' by itself, .*, got 'demo,pair=interleave'"),
        (
            "pair=interleave,student=tiny",
            r"expected a pair by itself, since it names both models, ",
        ),
        (
            "pair=interleave,pair=long-llava",
            r"expected one pair, got 'pair=interleave,pair=long-ll",
        ),
        ("student=tiny,student=tiny", r"expected one student, got 'student=tiny,student=tiny'"),
        ("demo,full", r"experiment argument: expected one size, got 'demo,full'"),
        ("teacher=tiny,pair=long-llava", r"expected a pair by itself, .*, got 'teacher=tiny,pair="),
    ],
)
def test_unknown_argument(arg, message):
    with pytest.raises(ValueError, match=message):
        config_of("d2d", arg)


def test_recipe_has_no_tiny_size():
    with pytest.raises(ValueError, match=r"expected one of 'full', 'demo', got 'tiny'"):
        recipe_of("tiny")


@pytest.mark.parametrize("arg", [None, "demo", "pair=interleave", "pair=long-llava"])
def test_stages_of_the_recipe_follow_each_other(arg):
    """A model below the recipe's folder was made by an earlier stage; stages are named once."""
    recipe = recipe_of(arg)
    assert sorted(recipe.order) == sorted(recipe.stages)
    made = set()
    for name in recipe.order:
        stage = recipe.stages[name]
        stage_of(stage)
        for path in (stage.student, stage.teacher, stage.vision):
            assert not path.startswith("{workdir}") or path in made, f"{name}: {path}"
        assert not made or stage.student in made or arg == "demo", f"{name}: {stage.student}"
        made.add(f"{{workdir}}/{name}/model")
    assert set(recipe.evaluated) <= set(recipe.order)


def test_tiny_records_are_always_the_same(tmp_path):
    def made(name):
        common.write_tiny_data(tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    assert made("a") == made("b")
    assert common.tiny_data() == common.tiny_data()


FULL_SIZE = [
    *((stage, arg) for stage in STAGES for arg in (None, "student=qwen2-0.5b,teacher=qwen2-7b")),
    *((stage, "pair=interleave") for stage in ("d2d", "d2s", "preference")),
    ("d2s", "pair=long-llava"),
    ("teacher_init", "student=qwen1.5-7b"),
]


@pytest.mark.parametrize(("stage", "arg"), FULL_SIZE)
def test_full_size_step_fits_together(stage, arg):
    """State, step and shardings of published sizes, by shapes only."""
    config = config_of(stage, arg)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    architecture, reference = planner.architectures(config)
    program = make_program(config, architecture, reference, mesh)
    state = with_shardings(program.abstract_state, program.state_shardings)
    batch = planner.abstract_batch(config, architecture, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        new, metrics = jax.eval_shape(program.step, state, program.teacher, batch)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
    assert all(jax.tree.leaves((same.params, same.frozen, same.opt_state)))
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
    assert (program.teacher is not None) == stage_of(config).teacher
    assert (architecture.decoder.moe is not None) == (stage in ("d2s", "preference"))
    assert all(pair[0].shape == pair[1].shape == () for pair in metrics.values())
