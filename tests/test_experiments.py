import dataclasses
import importlib

import jax
import jax.numpy as jnp
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
    ("stage", "lr", "batch_size", "records"),
    [
        ("init", 1e-4, 512, 600_000),
        ("d2d", 2e-5, 256, 2_400_000),
        ("d2s", 2e-5, 256, 1_400_000),
        ("preference", 2e-6, 256, 80_000),
        ("sft", 2e-5, 128, 665_000),
    ],
)
def test_settings_of_the_paper(stage, lr, batch_size, records):
    config = config_of(stage)
    assert (config.stage, config.optim.lr, config.batch_size) == (stage, lr, batch_size)
    assert config.steps == records // batch_size  # one epoch
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.98)
    assert (config.optim.warmup_ratio, config.optim.weight_decay) == (0.03, 0)
    assert (config.data.max_length, config.dtype) == (2048, "bfloat16")
    assert (config.trainable, config.data.template) == ("paper", "vicuna")


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
    models = {"student": paper.student, "teacher": paper.teacher}
    assert dataclasses.replace(ours, **models, data=paper.data) == paper
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
