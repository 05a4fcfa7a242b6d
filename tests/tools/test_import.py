import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moddistill.config import MoeConfig
from moddistill.model_folder import load, read_model_config, save_model
from moddistill.tree import flatten
from tests.tools import hf_folders as hf
from tools.convert_weights import clip, llava, siglip, store
from tools.convert_weights.assemble import import_model
from tools.convert_weights.chat_template import chat_template
from tools.convert_weights.export import export_model
from tools.convert_weights.tensors import open_checkpoint
from tools.convert_weights.upcycle import upcycle_model

GB = 10**9

LANGUAGE_MODELS = {f"Qwen2, {name}": text for name, text in hf.QWEN2.items()}
LANGUAGE_MODELS |= {f"Qwen3, {name}": text for name, text in hf.QWEN3.items()}


def multimodal(name, image_token):
    text = hf.Text(tied="untied" not in name, head_dim=16 if "Qwen3" in name else 0)
    vision = hf.clip_config()
    if "SigLIP" in name:
        vision = hf.siglip_config(vision_use_head="pooling" in name)
    return hf.llava(text.config(), vision, image_token)


MULTIMODAL = (
    "CLIP and Qwen2",
    "CLIP and Qwen2, untied",
    "CLIP and Qwen3",
    "SigLIP and Qwen2",
    "SigLIP with its pooling head and Qwen2",
)


def tensors(folder):
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("text", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_language_model_in_and_out(
    text, tmp_path, small_tokenizer, our_logits, torch_logits, random_inputs
):
    model = text.model()
    source = hf.save(model, tmp_path / "hf", small_tokenizer, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    config = import_model(str(source), tmp_path / "ours")
    tokens, _ = random_inputs(config)
    theirs = torch_logits(model, tokens)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), theirs, atol=1e-4)
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=GB)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.parametrize("whole", [False, True], ids=["language model", "LLaVA"])
def test_stored_head_that_repeats_the_embedding_comes_back(whole, tmp_path, small_tokenizer):
    """As Qwen1.5 has been published."""
    model = multimodal("CLIP and Qwen2", small_tokenizer.image_id) if whole else hf.Text().model()
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    state = {name: np.array(x) for name, x in tensors(source).items()}
    outer = "language_model." if whole else ""
    state[f"{outer}lm_head.weight"] = state[f"{outer}model.embed_tokens.weight"].copy()
    save_file(state, source / "model.safetensors")
    import_model(str(source), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=GB)
    assert_same_tensors(tensors(tmp_path / "back"), state)


def test_heads_of_qwen3_are_128_wide_if_nothing_is_said(tmp_path, small_tokenizer):
    source = hf.save(
        hf.Text(width=32, layers=1, head_dim=128).model(), tmp_path / "hf", small_tokenizer
    )
    fields = json.loads((source / "config.json").read_text())
    del fields["head_dim"]
    (source / "config.json").write_text(json.dumps(fields | {"rope_theta": 1e6}))
    assert import_model(str(source), tmp_path / "ours").decoder.head_dim == 128


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_model_in_and_out(
    name, tmp_path, small_tokenizer, our_logits, torch_logits, random_inputs
):
    model = multimodal(name, small_tokenizer.image_id)
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    config = import_model(str(source), tmp_path / "ours")
    tokens, images = random_inputs(config)
    theirs = torch_logits(model, tokens, images, config)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens, images), theirs, atol=1e-4)
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=GB)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


QWEN2_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_and_context_come_back_until_a_stage_trains(place, tmp_path, small_tokenizer):
    source = hf.save(
        multimodal("CLIP and Qwen2", small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
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

    config = import_model(str(source), tmp_path / "ours")
    upcycle_model(tmp_path / "ours", tmp_path / "sparse", MoeConfig())
    assert exported("ours") == exported("sparse") == (QWEN2_TEMPLATE, 4321)
    save_model(tmp_path / "trained", config, load(tmp_path / "ours")[1], small_tokenizer, {})
    assert exported("trained") == (chat_template("chatml"), 32768)
    import_model(str(source), tmp_path / "other", template="vicuna")
    assert exported("other") == (chat_template("vicuna"), 4321)


@pytest.mark.parametrize("spelling", llava.SPELLINGS, ids=lambda parts: parts[2])
@pytest.mark.parametrize(
    "name", ["CLIP and Qwen2, untied", "SigLIP with its pooling head and Qwen2"]
)
def test_names_come_back_as_they_were_spelt(name, spelling, tmp_path, small_tokenizer):
    source = hf.save(multimodal(name, small_tokenizer.image_id), tmp_path / "hf", small_tokenizer)
    tower = siglip if "SigLIP" in name else clip
    before = llava.find_spelling(open_checkpoint(source), tower)
    renamed = {}
    for key, x in tensors(source).items():
        # The prefix of the head may be empty or begin that of the decoder.
        part = next(i for i in (0, 2, 3, 1) if key.startswith(before[i]))
        renamed[spelling[part] + key.removeprefix(before[part])] = np.array(x)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(renamed, source / "model.safetensors")
    import_model(str(source), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=GB)
    assert_same_tensors(tensors(tmp_path / "back"), renamed)


@pytest.mark.parametrize("lost", ["language_model.model.norm.weight", "vision_tower.embeddings."])
def test_tensors_that_are_missing_leave_the_spelling_alone(lost, tmp_path, small_tokenizer):
    source = hf.save(
        multimodal("CLIP and Qwen2", small_tokenizer.image_id), tmp_path / "hf", small_tokenizer
    )
    state = tensors(source)
    kept = {name: np.array(x) for name, x in state.items() if not name.startswith(lost)}
    assert len(kept) < len(state)
    save_file(kept, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        import_model(str(source), tmp_path / "ours")
    assert len(str(error.value).splitlines()) == 1 + len(state) - len(kept)
    assert "unexpected" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_large_matrices_are_moved_in_parts(
    tied, tmp_path, small_tokenizer, monkeypatch, our_logits, torch_logits, random_inputs
):
    """With blocks of a kilobyte, embedding and head are many."""
    monkeypatch.setattr(store, "_BLOCK", 1024)
    model = hf.Text(tied=tied).model()
    source = hf.save(model, tmp_path / "hf", small_tokenizer)
    config = import_model(str(source), tmp_path / "ours")
    _, cuts = store.blocks((config.decoder.vocab_size, config.decoder.width), 4)
    assert len(cuts) == 40
    tokens, _ = random_inputs(config)
    theirs = torch_logits(model, tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), theirs, atol=1e-4)
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=GB)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_bfloat16_stays_bfloat16(tmp_path, small_tokenizer):
    source = hf.save(hf.Text().model().bfloat16(), tmp_path / "hf", small_tokenizer)
    import_model(str(source), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size=20_000)
    ours = tensors(tmp_path / "back")
    assert {x.dtype for x in ours.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_tensors(ours, tensors(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP"])
def test_parts_make_the_model_they_came_from(
    tower, tmp_path, small_tokenizer, our_logits, torch_logits, random_inputs
):
    """Language model, tower and projector, saved one by one, give the logits of the whole."""
    whole = multimodal(f"{tower} and Qwen2", small_tokenizer.image_id)
    language = hf.Text().model()
    language.load_state_dict(
        {f"model.{name}": x for name, x in whole.model.language_model.state_dict().items()},
        strict=False,
    )
    part = hf.clip_tower() if tower == "CLIP" else hf.siglip_tower()
    part.load_state_dict(whole.model.vision_tower.state_dict())
    source = hf.save(language, tmp_path / "language", small_tokenizer)
    vision = hf.save(part, tmp_path / "vision")
    projector = {}
    for name, x in whole.model.multi_modal_projector.state_dict().items():
        name = name.replace("linear_1", "0").replace("linear_2", "2")
        projector[f"model.mm_projector.image_spatial_proj.{name}"] = x
    torch.save(projector, tmp_path / "mm_projector.bin")
    config = import_model(
        str(source),
        tmp_path / "ours",
        vision=str(vision),
        projector=str(tmp_path / "mm_projector.bin"),
        select_layer=-2 if tower == "CLIP" else -1,
    )
    tokens, images = random_inputs(config)
    theirs = torch_logits(whole, tokens, images, config)
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens, images), theirs, atol=1e-4)


def test_projector_that_nobody_gave_is_new(tmp_path, small_tokenizer):
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


def original_names(state):
    """Hugging Face's LLaVA names as the original code has them."""
    renamed = {}
    for name, x in state.items():
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("model.vision_tower.", "model.image_tower.image_tower.vision_model.")
        renamed[name] = x
    return renamed


ORIGINAL_CONFIG = {
    "model_type": "moe_llava_qwen2",
    "image_projector_type": "mlp2x_gelu",
    "mm_image_tower": "openai/clip-vit-large-patch14-336",
}


def original_config(text):
    fields = text.to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
            "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
    return {key: fields[key] for key in keep} | {"rope_theta": 1e6} | ORIGINAL_CONFIG


def test_original_dense_checkpoint(
    tmp_path, small_tokenizer, our_logits, torch_logits, random_inputs
):
    whole = multimodal("CLIP and Qwen2, untied", small_tokenizer.image_id)
    source = hf.save_original(
        original_names(whole.state_dict()),
        original_config(whole.config.text_config),
        tmp_path / "original",
        small_tokenizer,
    )
    tower = hf.clip_tower()
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    vision = hf.save(tower, tmp_path / "vision")
    config = import_model(str(source), tmp_path / "ours", vision=str(vision))
    assert config.template == "vicuna"
    tokens, images = random_inputs(config)
    theirs = torch_logits(whole, tokens, images, config)
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens, images), theirs, atol=1e-4)


@pytest.fixture
def original(tmp_path, small_tokenizer):
    """`original(**fields)`: a checkpoint of the original code with these in its config; a tower."""
    whole = multimodal("CLIP and Qwen2, untied", small_tokenizer.image_id)
    tower = hf.clip_tower()
    tower.load_state_dict(whole.model.vision_tower.state_dict())

    def make(**fields):
        source = hf.save_original(
            original_names(whole.state_dict()),
            original_config(whole.config.text_config) | fields,
            tmp_path / "original",
            small_tokenizer,
        )
        return str(source), tower

    return make


def test_original_checkpoint_selects_its_layer(original, tmp_path):
    source, tower = original(mm_vision_select_layer=-1)
    vision = str(hf.save(tower, tmp_path / "vision"))
    assert import_model(source, tmp_path / "a", vision=vision).vision.select_layer == -1
    chosen = import_model(source, tmp_path / "b", vision=vision, select_layer=-2)
    assert chosen.vision.select_layer == -2


@pytest.mark.parametrize(
    "fields", [{"mm_use_im_start_end": True}, {"mm_vision_select_feature": "cls_patch"}]
)
def test_settings_of_the_original_code_that_are_not_built(original, fields, tmp_path):
    source, tower = original(**fields)
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; accepted"):
        import_model(source, tmp_path / "a", vision=str(hf.save(tower, tmp_path / "vision")))


def test_original_checkpoint_with_another_tower_than_the_one_given(original, tmp_path):
    source, tower = original()
    with torch.no_grad():
        next(tower.parameters())[0] += 1
    vision = str(hf.save(tower, tmp_path / "vision"))
    with pytest.raises(ValueError, match=r"has a tower of its own, whose .* is not that of"):
        import_model(source, tmp_path / "a", vision=vision)


def test_original_checkpoint_with_its_tower_in_bfloat16(original, tmp_path):
    """The original code casts its tower to the dtype it trains in."""
    source, tower = original()
    file = Path(source) / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save({k: x.bfloat16() if "tower" in k else x for k, x in state.items()}, file)
    vision = str(hf.save(tower, tmp_path / "vision"))
    import_model(source, tmp_path / "a", vision=vision)
    kept = load(tmp_path / "a")[1]["vision"]["positions"]
    table = tower.embeddings.position_embedding.weight
    np.testing.assert_array_equal(kept, table.detach().numpy())


def test_original_sparse_checkpoint(
    tmp_path, small_tokenizer, our_logits, torch_logits, random_inputs
):
    """DeepSpeed's names; the same weights in Qwen2-MoE, whose shared expert is nought."""
    text = hf.sparse_text(hf.Text(tied=False))
    whole = hf.clear_shared_expert(
        hf.llava(text, hf.clip_config(), image_token=small_tokenizer.image_id)
    )
    state = {}
    for name, x in original_names(whole.state_dict()).items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "gate.weight":
            state[f"{layer}.mlp.deepspeed_moe.gate.wg.weight"] = x
        elif rest == "experts.down_proj":
            state |= {expert(layer, i, "down"): part.clone() for i, part in enumerate(x)}
        elif rest == "experts.gate_up_proj":
            for i, part in enumerate(x):
                gate, up = part.chunk(2)
                state |= {
                    expert(layer, i, "gate"): gate.clone(),
                    expert(layer, i, "up"): up.clone(),
                }
        elif "shared_expert" not in rest:
            state[name] = x
    fields = original_config(text) | {"moe": {"top_k_experts": 2, "num_experts": [4]}}
    source = hf.save_original(state, fields, tmp_path / "original", small_tokenizer)
    tower = hf.clip_tower()
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    vision = hf.save(tower, tmp_path / "vision")
    config = import_model(str(source), tmp_path / "ours", vision=str(vision))
    assert config.decoder.moe_layers == (0, 2)
    assert (config.decoder.moe.num_experts, config.decoder.moe.top_k) == (4, 2)
    tokens, images = random_inputs(config)
    theirs = torch_logits(whole, tokens, images, config)
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens, images), theirs, atol=1e-4)


def expert(layer, number, name):
    return f"{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{number}.{name}_proj.weight"
