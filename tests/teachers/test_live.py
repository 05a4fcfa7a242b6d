import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MeshConfig, TrainConfig
from moddistill.convert.resolve import load, resolve
from moddistill.distributed.sharding import make_mesh
from moddistill.params import flatten
from moddistill.storage.model_folder import save_model
from moddistill.teachers import live
from moddistill.training.program import make_program


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def changed(config, **fields):
    """An architecture with other fields of itself, its decoder or its tower."""
    for part in ("decoder", "vision"):
        names = {f.name for f in dataclasses.fields(getattr(config, part))}
        own = {name: fields.pop(name) for name in list(fields) if name in names}
        config = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **own)}
        )
    return dataclasses.replace(config, **fields)


def test_teacher_without_a_vision_encoder_is_refused(tiny_architecture):
    student = tiny_architecture()
    live.check_teacher(student, student, "runs/t")
    message = "^expected a teacher with a vision tower, as the student has, got 'runs/t' without"
    with pytest.raises(ValueError, match=message):
        live.check_teacher(dataclasses.replace(student, vision=None), student, "runs/t")


@pytest.mark.parametrize(
    ("fields", "is_own"),
    [
        ({}, False),
        ({"vocab_size": 400}, False),  # padding rows
        ({"num_layers": 3}, False),
        ({"template": "chatml"}, True),
        ({"image_token_id": 5}, True),
        ({"patch_size": 7}, True),
        ({"image_size": 56, "patch_size": 28}, True),  # as many patches
        ({"mean": (0.5, 0.5, 0.5)}, True),  # images are padded with its colour
    ],
    ids=str,
)
def test_layouts_differ_in_what_models_read(tiny_architecture, fields, is_own):
    student = tiny_architecture()
    assert live.has_own_layout(changed(student, **fields), student) == is_own


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("distillation.image_kd_weight", 1.0, "0.0"),
        ("distillation.relation_weight", 0.5, "0.0"),
        ("distillation.kd_positions", "all_tokens", "'response'"),
        ("on_policy.share", 0.5, "0"),
    ],
)
def test_teacher_of_another_layout_has_predictions_of_answers_only(
    name, value, least, tiny_config, tiny_architecture, init, tokenizer, tmp_path
):
    model = dataclasses.replace(tiny_architecture("tiny-teacher"), template="chatml")
    save_model(tmp_path / "teacher", model, init(model), tokenizer, {})
    part, field = name.split(".")
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"), **{part: {field: value}})
    message = (
        rf"^config\.{part}\.{field}: expected {least}, since the teacher .*/teacher' has another "
        "template, image token or image size than the student, got "
    )
    arguments = resolve(config.teacher), tiny_architecture(), tokenizer, tokenizer
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(config, *arguments)
    same = dataclasses.replace(config, **{part: getattr(TrainConfig(), part)})
    assert live.teacher_architecture(same, *arguments).template == "chatml"


def test_teacher_is_loaded_in_the_frozen_dtype(
    tiny_config, tiny_architecture, tiny_models, tokenizer, mesh
):
    config = tiny_config("d2d", teacher=str(tiny_models["teacher"]), dtype="bfloat16")
    student = tiny_architecture()
    model = resolve(config.teacher, tokenizer)
    teacher = live.teacher_architecture(config, model, student, tokenizer, tokenizer)
    shapes = make_program(config, student, teacher, mesh).teacher
    flat = flatten(live.load_teacher(config, model.folder, teacher, shapes, mesh))
    assert flat["decoder/embedding"].dtype == jnp.bfloat16
    assert flat["decoder/norm/scale"].dtype == jnp.float32


@pytest.mark.parametrize("source", ["folder", "random"])
def test_teacher_is_quantized_and_offloaded(
    source, tiny_config, tiny_architecture, tiny_models, tokenizer, mesh
):
    folder = {"folder": str(tiny_models["teacher"]), "random": "random:tiny-teacher"}[source]
    fields = {"teacher_quantization": "int8", "teacher_offload": True}
    config = tiny_config("d2d", teacher=folder, dtype="float32", **fields)
    student = tiny_architecture()
    model = resolve(config.teacher, tokenizer)
    teacher = live.teacher_architecture(config, model, student, tokenizer, tokenizer)
    shapes = make_program(config, student, teacher, mesh).teacher
    params = live.load_teacher(config, model.folder, teacher, shapes, mesh)
    jax.tree.map(lambda x, shape: chex.assert_equal(x.sharding, shape.sharding), params, shapes)
    kernel = params["decoder"]["segment_0"]["block_0"]["mlp"]["gate"]["kernel"]
    assert kernel["int8"].dtype == jnp.int8
    assert kernel["int8"].sharding.memory_kind == "pinned_host"
    if source == "folder":
        stored = flatten(load(folder)[1])["decoder/segment_0/block_0/mlp/gate/kernel"]
        unpacked = np.asarray(kernel["int8"]) * np.asarray(kernel["step"])
        np.testing.assert_allclose(unpacked, stored, atol=0.01)


def test_vision_encoders_are_equal_if_all_their_weights_are(tiny_models):
    params = load(tiny_models["teacher"])[1]
    frozen = {path: x for path, x in flatten(params).items() if path.startswith("vision/")}
    assert live.same_tower(frozen, params)
    path = "vision/patch/kernel"
    assert not live.same_tower(frozen | {path: frozen[path].at[0, 0].add(1.0)}, params)
    del frozen[path]
    assert not live.same_tower(frozen, params)
