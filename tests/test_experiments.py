import importlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from experiments import common, llava_mod
from moddistill import plan
from moddistill.config import MeshConfig, RecipeConfig, TrainConfig, from_config_dict
from moddistill.models.presets import PRESETS
from moddistill.program import make_program, place
from moddistill.sharding import RULES, make_mesh
from moddistill.stages import stage_of

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
    moe, loss = config_of("d2s").moe, config_of("preference").loss
    assert (moe.num_experts, moe.top_k, moe.placement) == (4, 2, "sparse")
    assert (loss.preference, loss.beta, loss.label_smoothing) == ("kto_pair", 0.1, 0)
    assert (loss.kd_positions, loss.kd_shift) == ("response", "correct")


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
    ("arg", "message"),
    [
        ("dmeo", r"argument 'dmeo' is unknown; accepted: full, .*did you mean 'demo'"),
        ("student=qwen2-0.5", r"preset 'qwen2-0\.5' is unknown; .*did you mean 'qwen2-0\.5b'"),
        ("studnet=tiny", r"'studnet=tiny' is unknown"),
        ("tiny,student=qwen2-0.5b", r"sets student, but tiny has its own models; accepted: pre"),
        ("student=tiny,teacher=tiny,demo", r"sets student and teacher, but demo has its own"),
    ],
)
def test_unknown_argument(arg, message):
    with pytest.raises(ValueError, match=message):
        config_of("d2d", arg)


def test_recipe_has_no_tiny_size():
    with pytest.raises(ValueError, match=r"no size 'tiny' here; accepted: full, demo"):
        recipe_of("tiny")


@pytest.mark.parametrize("arg", [None, "demo"])
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
        made.add(f"{{workdir}}/{name}/model")
    assert set(recipe.evaluated) <= set(recipe.order)


def test_tiny_records_are_always_the_same(tmp_path):
    def made(name):
        common.write_tiny_data(tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    assert made("a") == made("b")
    assert common.tiny_data() == common.tiny_data()


PAIRS = [("qwen1.5-1.8b", "qwen1.5-7b"), ("qwen2-0.5b", "qwen2-7b")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_full_size_step_fits_together(stage, student, teacher):
    """State, step and shardings of published sizes, by shapes alone."""
    config = config_of(stage, f"student={student},teacher={teacher}")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    architecture, reference = plan.architectures(config)
    program = make_program(config, architecture, reference, mesh)
    state = place(program.state, program.places)
    batch = plan.abstract_batch(config, architecture, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        new, metrics = jax.eval_shape(program.step, state, program.teacher, batch)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
    assert all(jax.tree.leaves((same.params, same.frozen, same.opt_state)))
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
    assert (program.teacher is not None) == stage_of(config).teacher
    assert (architecture.decoder.moe is not None) == (stage in ("d2s", "preference"))
    assert all(pair[0].shape == pair[1].shape == () for pair in metrics.values())
