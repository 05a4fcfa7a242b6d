import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.jinja_template import chat_template
from moddistill.convert.resolve import load
from moddistill.convert.upcycling import upcycle_model
from moddistill.params import flatten
from moddistill.storage import orbax_layout
from moddistill.storage.model_folder import read_model_config, save_model
from moddistill.storage.shards import open_checkpoint
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.convert.published_names import published_name

GB = 10**9

LANGUAGE_MODELS = {f"Qwen2, {name}": text for name, text in hf.QWEN2.items()}
LANGUAGE_MODELS |= {f"Qwen3, {name}": text for name, text in hf.QWEN3.items()}


MULTIMODAL = (
    "CLIP and Qwen2",
    "CLIP and Qwen2, untied",
    "CLIP and Qwen2, seven queries a key",
    "CLIP and Qwen3",
    "SigLIP and Qwen2",
    "SigLIP and Qwen2, three heads",
    "SigLIP with its pooling head and Qwen2",
)


# Options of an export with every tensor of the source.
WHOLE = {"max_shard_size": GB, "vocabulary": "padded"}


def tensors(folder):
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}


def assert_same_tensors(tensors, expected_tensors):
    assert tensors.keys() == expected_tensors.keys()
    for name, expected in expected_tensors.items():
        assert tensors[name].dtype == expected.dtype, name
        assert tensors[name].shape == expected.shape, name
        assert tensors[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("text", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_language_model_roundtrip(
    text, tmp_path, small_tokenizer, model_logits, torch_logits, random_inputs
):
    model = text.model()
    source = hf.save(model, tmp_path / "hf", small_tokenizer, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    config = import_model(str(source), tmp_path / "model")
    tokens, _ = random_inputs(config)
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(model_logits(tmp_path / "model", tokens), expected, atol=1e-4)
    export_model(tmp_path / "model", tmp_path / "back", **WHOLE)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.parametrize("is_llava", [False, True], ids=["language model", "LLaVA"])
def test_stored_tied_head_is_exported_again(is_llava, tmp_path, small_tokenizer):
    """As in published Qwen1.5 folders."""
    model = (
        hf.multimodal("CLIP and Qwen2", small_tokenizer.image_id) if is_llava else hf.Text().model()
    )
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    state = {name: np.array(x) for name, x in tensors(source).items()}
    outer = "language_model." if is_llava else ""
    state[f"{outer}lm_head.weight"] = state[f"{outer}model.embed_tokens.weight"].copy()
    save_file(state, source / "model.safetensors")
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "back", **WHOLE)
    expected = {published_name(name) if is_llava else name: x for name, x in state.items()}
    assert_same_tensors(tensors(tmp_path / "back"), expected)


def test_default_head_dim_of_qwen3_is_128(tmp_path, small_tokenizer):
    source = hf.save(
        hf.Text(hidden_size=32, num_layers=1, head_dim=128).model(),
        tmp_path / "hf",
        small_tokenizer,
    )
    fields = json.loads((source / "config.json").read_text())
    del fields["head_dim"]
    (source / "config.json").write_text(json.dumps(fields | {"rope_theta": 1e6}))
    assert import_model(str(source), tmp_path / "model").decoder.head_dim == 128


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_model_roundtrip(
    name, tmp_path, small_tokenizer, model_logits, torch_logits, random_inputs
):
    model = hf.multimodal(name, small_tokenizer.image_id)
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    config = import_model(str(source), tmp_path / "model")
    tokens, images = random_inputs(config)
    expected = torch_logits(model, tokens, images, config)
    assert expected.std() > 0.5
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-4
    )
    export_model(tmp_path / "model", tmp_path / "back", **WHOLE)
    published = {published_name(name): x for name, x in tensors(source).items()}
    assert_same_tensors(tensors(tmp_path / "back"), published)


QWEN2_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_context_is_exported_and_the_chat_template_until_a_stage_trains(
    place, tmp_path, small_tokenizer
):
    source = hf.save(
        hf.multimodal("CLIP and Qwen2", small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
    )
    fields = json.loads((source / "config.json").read_text())
    fields["text_config"]["max_position_embeddings"] = 4321
    (source / "config.json").write_text(json.dumps(fields))
    if place.endswith("json"):
        settings = json.loads((source / place).read_text()) | {"chat_template": QWEN2_TEMPLATE}
        (source / place).write_text(json.dumps(settings))
    else:
        (source / place).write_text(QWEN2_TEMPLATE)

    def exported(model):
        out = tmp_path / f"{model}-out"
        config = export_model(tmp_path / model, out, max_shard_size=GB)
        return (
            (out / "chat_template.jinja").read_text(),
            config["text_config"]["max_position_embeddings"],
        )

    config = import_model(str(source), tmp_path / "model")
    upcycle_model(tmp_path / "model", tmp_path / "sparse", ExpertConfig())
    assert exported("model") == exported("sparse") == (QWEN2_TEMPLATE, 4321)
    save_model(tmp_path / "trained", config, load(tmp_path / "model")[1], small_tokenizer, {})
    assert exported("trained") == (chat_template("chatml"), 4321)
    import_model(str(source), tmp_path / "other", template="vicuna")
    assert exported("other") == (chat_template("vicuna"), 4321)


@pytest.mark.parametrize("lost", ["language_model.model.norm.weight", "vision_tower.embeddings."])
def test_missing_tensors_do_not_change_the_detected_prefixes(lost, tmp_path, small_tokenizer):
    source = hf.save(
        hf.multimodal("CLIP and Qwen2", small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
    )
    state = tensors(source)
    remaining = {name: np.array(x) for name, x in state.items() if not name.startswith(lost)}
    assert len(remaining) < len(state)
    save_file(remaining, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        import_model(str(source), tmp_path / "model")
    assert len(str(error.value).splitlines()) == 1 + len(state) - len(remaining)
    assert "unexpected" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_large_matrices_are_converted_in_blocks(
    tied, tmp_path, small_tokenizer, monkeypatch, model_logits, torch_logits, random_inputs
):
    """With blocks of 256 bytes, embedding and head have many blocks."""
    monkeypatch.setattr(orbax_layout, "_LARGEST_BLOCK", 256)
    model = hf.Text(tied=tied).model()
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    config = import_model(str(source), tmp_path / "model")
    _, cuts = orbax_layout.blocks((config.decoder.vocab_size, config.decoder.hidden_size), 4)
    assert len(cuts) == 40
    tokens, _ = random_inputs(config)
    expected = torch_logits(model, tokens)
    np.testing.assert_allclose(model_logits(tmp_path / "model", tokens), expected, atol=1e-4)
    export_model(tmp_path / "model", tmp_path / "back", **WHOLE)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_bfloat16_weights_are_stored_as_bfloat16(tmp_path, small_tokenizer):
    source = hf.save(hf.Text().model().bfloat16(), tmp_path / "hf", small_tokenizer)
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "back", max_shard_size=20_000, vocabulary="padded")
    exported = tensors(tmp_path / "back")
    assert {x.dtype for x in exported.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_tensors(exported, tensors(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP"])
def test_import_from_parts_equals_import_of_the_model(
    tower, tmp_path, small_tokenizer, model_logits, torch_logits, random_inputs
):
    """Language model, tower and projector, saved separately, give the logits of the model."""
    full = hf.multimodal(f"{tower} and Qwen2", small_tokenizer.image_id)
    language = hf.Text().model()
    language.load_state_dict(
        {f"model.{name}": x for name, x in full.model.language_model.state_dict().items()},
        strict=False,
    )
    part = hf.clip_tower() if tower == "CLIP" else hf.siglip_tower()
    part.load_state_dict(full.model.vision_tower.state_dict())
    source = hf.save(language, tmp_path / "language", small_tokenizer)
    vision = hf.save(part, tmp_path / "vision")
    projector = {}
    for name, x in full.model.multi_modal_projector.state_dict().items():
        name = name.replace("linear_1", "0").replace("linear_2", "2")
        projector[f"model.mm_projector.image_spatial_proj.{name}"] = x
    torch.save(projector, tmp_path / "mm_projector.bin")
    config = import_model(
        str(source),
        tmp_path / "model",
        vision=str(vision),
        projector=str(tmp_path / "mm_projector.bin"),
        select_layer=-2 if tower == "CLIP" else -1,
    )
    tokens, images = random_inputs(config)
    expected = torch_logits(full, tokens, images, config)
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-4
    )


@pytest.mark.slow
def test_missing_projector_is_initialized_from_the_seed(tmp_path, small_tokenizer):
    source = hf.save(hf.Text().model(), tmp_path / "language", small_tokenizer)
    vision = hf.save(hf.clip_tower(), tmp_path / "vision")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_model(str(source), tmp_path / name, vision=str(vision), seed=seed)
    a, b, c = (flatten(load(tmp_path / name)[1]) for name in "abc")
    first = "projector/linear_0/kernel"
    np.testing.assert_array_equal(a[first], b[first])
    assert np.any(a[first] != c[first])
    assert 0.5 < np.std(a[first]) * a[first].shape[0] ** 0.5 < 2
    assert not np.any(a["projector/linear_0/bias"])
    assert read_model_config(tmp_path / "a").vision.select_layer == -2
    described = json.loads((tmp_path / "a" / "model.json").read_text())
    assert len(described["source"]["imported"]["new"]) == 4


def test_pickled_shards_are_imported_by_their_index(tmp_path, small_tokenizer):
    """The same model from two `.bin` files as from one `.safetensors`."""
    model = hf.Text().model()
    full = hf.save(model, tmp_path / "full", small_tokenizer)
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in full.iterdir():
        if file.suffix == ".json":
            (shards / file.name).write_bytes(file.read_bytes())
    state = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    places = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in names}, shards / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    imported = {}
    for folder in (full, shards):
        import_model(str(folder), tmp_path / f"{folder.name}-model")
        imported[folder.name] = flatten(load(tmp_path / f"{folder.name}-model")[1])
    assert imported["shards"].keys() == imported["full"].keys()
    for path, x in imported["full"].items():
        np.testing.assert_array_equal(imported["shards"][path], x, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["vicuna", "chatml", "plain"])
def test_export_imports_with_its_template(template, tmp_path, small_tokenizer):
    model = hf.multimodal("CLIP and Qwen2", small_tokenizer.image_id)
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    import_model(str(source), tmp_path / "model", template=template)
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    assert import_model(str(tmp_path / "out"), tmp_path / "again").template == template
    export_model(tmp_path / "again", tmp_path / "back", max_shard_size=GB)
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "out" / name).read_text()
