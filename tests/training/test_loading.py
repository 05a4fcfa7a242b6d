import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.convert.resolve import load, resolve
from moddistill.data.tokenizer import Tokenizer, train_bpe
from moddistill.distributed.sharding import make_mesh
from moddistill.params import flatten
from moddistill.storage.model_folder import save_model
from moddistill.teachers import live
from moddistill.training import loading
from moddistill.training.architectures import resolve_models
from moddistill.training.program import make_program


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def random_words():
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), (300, 5))
    return [" ".join("".join(map(chr, word)) for word in letters)] * 2


@pytest.fixture
def start(mesh):
    """`start(config)`: what a stage trains, before the first step."""

    def make(config):
        models = resolve_models(config)
        return models.student_config, loading.student_params(config, models, mesh)

    return make


def test_new_weights_are_those_of_the_seed(start, tiny_config):
    seeds = (0, 0, 1)
    weights = [
        flatten(start(tiny_config("sft", seed=seed))[1])["decoder/embedding"] for seed in seeds
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.any(weights[0] != weights[2])


def test_student_of_a_folder_keeps_its_weights(start, tiny_config, tiny_models):
    config = tiny_config("sft", student=str(tiny_models["dense"]), tokenizer="")
    _, params = start(config)
    jax.tree.map(np.testing.assert_array_equal, params, load(tiny_models["dense"])[1])


def test_dense_to_sparse_copies_the_feed_forward_layers(start, tiny_config, tiny_models):
    config = tiny_config("d2s", student=str(tiny_models["dense"]), tokenizer="")
    target, params = start(config)
    assert target.decoder.moe == ExpertConfig(norm_topk_prob=True)
    sparse, dense = flatten(params), flatten(load(tiny_models["dense"])[1])
    for i, layer in enumerate(target.decoder.moe_layers):
        gate = dense["decoder/segment_0/block_0/mlp/gate/kernel"][layer]
        for expert in range(4):
            copy = sparse["decoder/segment_0/block_0/moe/experts_gate"][i, expert]
            np.testing.assert_array_equal(copy, gate)


def test_text_only_student_gets_a_vision_encoder_and_a_new_projector(
    start, tiny_config, tiny_architecture, tiny_models, tokenizer, init, tmp_path
):
    config = dataclasses.replace(tiny_architecture(), vision=None)
    save_model(tmp_path / "text", config, init(config), tokenizer, {})
    tower = str(tiny_models["teacher"])
    stage = tiny_config("init", student=str(tmp_path / "text"), vision=tower, tokenizer="")
    target, params = start(stage)
    assert target.vision == tiny_architecture("tiny-teacher").vision
    jax.tree.map(np.testing.assert_array_equal, params["vision"], load(tower)[1]["vision"])
    assert params["projector"]["linear_1"]["kernel"].shape == (16, 16)
    decoder = load(tmp_path / "text")[1]["decoder"]
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], decoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokenizer": ""},
            r"config\.tokenizer: expected a tokenizer folder, .*'random:tiny', got ''$",
        ),
        (
            {"student": "DENSE"},
            r"config\.tokenizer: expected '', since the student .* has its own, got '",
        ),
        ({"student": "nowhere", "tokenizer": ""}, r"^config\.student: 'nowhere' is not a m"),
        (
            {"student": "random:tinny"},
            r"^config\.student: preset 'tinny' is unknown; .*did you mean 'tiny'",
        ),
        ({"vision": "DENSE"}, r"config\.vision: expected '', since .*:tiny' has a vision encoder"),
        (
            {"student": "SPARSE", "tokenizer": ""},
            r"^config\.student: .* already has 4 experts in layers \(0, 2\)",
        ),
        (
            {"moe": {"top_k": 5}},
            r"^config\.moe\.top_k is 5; accepted: 1 to moe\.num_experts \(4\)",
        ),
    ],
)
def test_student_that_does_not_fit_is_refused(tiny_config, tiny_models, fields, message):
    folders = {"DENSE": str(tiny_models["dense"]), "SPARSE": str(tiny_models["sparse"])}
    fields = {k: folders.get(v, v) if isinstance(v, str) else v for k, v in fields.items()}
    config = tiny_config("d2s", **fields)
    with pytest.raises(ValueError, match=message):
        resolve_models(config)


def changed(config, **fields):
    """An architecture with other fields of itself, its decoder or its tower."""
    for part in ("decoder", "vision"):
        names = {f.name for f in dataclasses.fields(getattr(config, part))}
        own = {name: fields.pop(name) for name in list(fields) if name in names}
        config = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **own)}
        )
    return dataclasses.replace(config, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_token": 5}, "image token of 'runs/t': expected 300 as in the student, got 5"),
        (
            {"patch_size": 7},
            "positions per image of 'runs/t': expected 4 as in the student, got 16",
        ),
        (
            {"image_size": 56, "patch_size": 28},
            "image size of 'runs/t': expected 28 as in the student, got 56",
        ),
        (
            {"vision": None},
            "expected a teacher with a vision tower, as the student has, got 'runs/t' without one",
        ),
    ],
)
def test_teacher_that_does_not_fit_is_refused(tiny_architecture, fields, message):
    student = tiny_architecture()
    live.check_teacher(student, student, "runs/t")
    with pytest.raises(ValueError, match=f"^{message}$"):
        live.check_teacher(changed(student, **fields), student, "runs/t")


def test_teacher_may_have_more_padding_rows(tiny_architecture):
    student = tiny_architecture()
    live.check_teacher(changed(student, vocab_size=400), student, "runs/t")


def test_teacher_with_another_vocabulary_is_refused(
    tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """As many ids, but not the same ones."""
    other = train_bpe(random_words(), tokenizer.image_id)
    assert other.real_ids == tokenizer.real_ids
    params = load(tiny_models["teacher"])[1]
    save_model(tmp_path / "teacher", tiny_architecture("tiny-teacher"), params, other, {})
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    with pytest.raises(
        ValueError, match=r"vocabulary of .*: expected the student's id .* for token"
    ):
        live.teacher_architecture(config, resolve(config.teacher), tiny_architecture(), tokenizer)


def with_token(tokenizer, token):
    """The tokenizer with one more control token behind `<image>`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([token])
    assert backend.token_to_id(token) == tokenizer.image_id + 1
    return Tokenizer(backend)


@pytest.mark.parametrize("more", ["teacher", "student", "both"])
def test_control_token_of_one_side_is_masked_on_both(
    more, tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    theirs = tokenizer if more == "student" else with_token(tokenizer, "<pad>")
    ours = tokenizer if more == "teacher" else with_token(tokenizer, "<video>")
    config = tiny_architecture("tiny-teacher")
    decoder = dataclasses.replace(config.decoder, real_ids=theirs.real_ids)
    config = dataclasses.replace(config, decoder=decoder)
    save_model(tmp_path / "teacher", config, load(tiny_models["teacher"])[1], theirs, {})
    settings = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    accepted = live.teacher_architecture(
        settings, resolve(settings.teacher), tiny_architecture(), ours
    )
    assert accepted.decoder.real_ids == ((0, tokenizer.image_id),)


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_token_with_two_ids_is_named_with_both(
    where, tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """The last token is after `<image>` on one side, which has another token in its place."""
    vocab = json.loads(tokenizer.backend.to_str())
    last = tokenizer.image_id - 1
    [token] = [token for token in vocab["added_tokens"] if token["id"] == last]
    token["content"] = "<other>"
    renamed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(vocab)))
    name = tokenizer.decode([last], skip_special=False)
    other = with_token(renamed, name)
    theirs, ours = (other, tokenizer) if where == "teacher" else (tokenizer, other)
    save_model(
        tmp_path / "teacher",
        tiny_architecture("tiny-teacher"),
        load(tiny_models["teacher"])[1],
        theirs,
        {},
    )
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    ids = (last + 2, last) if where == "teacher" else (last, last + 2)
    message = rf"token '<\|im_end\|>' is {ids[0]} there and {ids[1]} in the student; accepted: eq"
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(config, resolve(config.teacher), tiny_architecture(), ours)


def test_word_that_only_the_student_has_is_refused(
    tiny_config, tiny_architecture, tiny_models, tokenizer, tmp_path
):
    """Text of the samples may become it, unlike a control token."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["<tool_call>"])
    save_model(
        tmp_path / "teacher",
        tiny_architecture("tiny-teacher"),
        load(tiny_models["teacher"])[1],
        tokenizer,
        {},
    )
    config = tiny_config("d2d", teacher=str(tmp_path / "teacher"))
    message = rf"token '<tool_call>' is None there and {tokenizer.image_id + 1} in the student"
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(
            config, resolve(config.teacher), tiny_architecture(), Tokenizer(backend)
        )


def test_teacher_is_loaded_in_the_frozen_dtype(
    tiny_config, tiny_architecture, tiny_models, tokenizer, mesh
):
    config = tiny_config("d2d", teacher=str(tiny_models["teacher"]), dtype="bfloat16")
    student = tiny_architecture()
    model = resolve(config.teacher, tokenizer)
    teacher = live.teacher_architecture(config, model, student, tokenizer)
    shapes = make_program(config, student, teacher, mesh).teacher
    flat = flatten(live.load_teacher(config, model.folder, teacher, shapes, mesh))
    assert flat["decoder/embedding"].dtype == jnp.bfloat16
    assert flat["decoder/norm/scale"].dtype == jnp.float32


@pytest.mark.parametrize("source", ["folder", "random"])
def test_teacher_is_quantized_and_offloaded(
    source, tiny_config, tiny_architecture, tiny_models, tokenizer, mesh
):
    folder = {"folder": str(tiny_models["teacher"]), "random": "random:tiny-teacher"}[source]
    fields = {"teacher_weights": "int8", "teacher_memory": "host"}
    config = tiny_config("d2d", teacher=folder, dtype="float32", **fields)
    student = tiny_architecture()
    model = resolve(config.teacher, tokenizer)
    teacher = live.teacher_architecture(config, model, student, tokenizer)
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


def test_tokenizer_with_more_ids_than_rows_is_refused(tiny_config):
    tokenizer = train_bpe(random_words(), 400)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the model's embedding 320"):
        resolve("random:tiny", tokenizer)
