"""Checkpoints of LLaVA's and LLaVA-MoD's code: tensor names, config, DeepSpeed's experts."""

from pathlib import Path

import numpy as np
import pytest

from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf


def original_names(state):
    """Renames tensors of LLaVA in `transformers` to the names of LLaVA's code."""
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


@pytest.mark.slow
def test_dense_checkpoint_of_llavas_code_is_imported(
    tmp_path, small_tokenizer, model_logits, torch_logits, random_inputs
):
    llava_model = hf.multimodal("CLIP and Qwen2, untied", small_tokenizer.image_id)
    source = hf.save_original(
        original_names(llava_model.state_dict()),
        original_config(llava_model.config.text_config),
        tmp_path / "original",
        small_tokenizer,
    )
    tower = hf.clip_tower()
    tower.load_state_dict(llava_model.model.vision_tower.state_dict())
    vision = hf.save(tower, tmp_path / "vision")
    config = import_model(str(source), tmp_path / "model", vision=str(vision))
    assert config.template == "vicuna"
    tokens, images = random_inputs(config)
    expected = torch_logits(llava_model, tokens, images, config)
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-4
    )


@pytest.fixture
def original(tmp_path, small_tokenizer):
    """`original(**fields)`: a checkpoint of the original code with these in its config; a tower."""
    llava_model = hf.multimodal("CLIP and Qwen2, untied", small_tokenizer.image_id)
    tower = hf.clip_tower()
    tower.load_state_dict(llava_model.model.vision_tower.state_dict())

    def make(**fields):
        source = hf.save_original(
            original_names(llava_model.state_dict()),
            original_config(llava_model.config.text_config) | fields,
            tmp_path / "original",
            small_tokenizer,
        )
        return str(source), tower

    return make


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_original_checkpoint_that_does_not_pad_its_images_is_reported(
    aspect, original, tmp_path, caplog
):
    source, tower = original(image_aspect_ratio=aspect)
    vision = hf.save(tower, tmp_path / "vision")
    import_model(source, tmp_path / "model", vision=str(vision))
    assert ("image_aspect_ratio 'square' -> 'pad'" in caplog.text) == (aspect == "square")


@pytest.mark.slow
def test_layer_selected_by_the_config_of_llavas_code_is_used(original, tmp_path):
    source, tower = original(mm_vision_select_layer=-1)
    vision = str(hf.save(tower, tmp_path / "vision"))
    assert import_model(source, tmp_path / "a", vision=vision).vision.select_layer == -1
    chosen = import_model(source, tmp_path / "b", vision=vision, select_layer=-2)
    assert chosen.vision.select_layer == -2


@pytest.mark.parametrize(
    "fields", [{"mm_use_im_start_end": True}, {"mm_vision_select_feature": "cls_patch"}]
)
def test_unsupported_settings_of_llavas_code_are_errors(original, fields, tmp_path):
    source, tower = original(**fields)
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
        import_model(source, tmp_path / "a", vision=str(hf.save(tower, tmp_path / "vision")))


def test_original_checkpoint_with_another_vision_tower_is_an_error(original, tmp_path):
    source, tower = original()
    with torch.no_grad():
        next(tower.parameters())[0] += 1
    vision = str(hf.save(tower, tmp_path / "vision"))
    with pytest.raises(
        ValueError,
        match=r"--vision: expected the .* tower that .* was trained with, .*, in which .* differs",
    ):
        import_model(source, tmp_path / "a", vision=vision)


def test_original_checkpoint_with_a_bfloat16_copy_of_its_tower_is_imported(original, tmp_path):
    """LLaVA's code casts the vision tower to the training dtype."""
    source, tower = original()
    file = Path(source) / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save({k: x.bfloat16() if "tower" in k else x for k, x in state.items()}, file)
    vision = str(hf.save(tower, tmp_path / "vision"))
    import_model(source, tmp_path / "a", vision=vision)
    positions = load(tmp_path / "a")[1]["vision"]["positions"]
    table = tower.embeddings.position_embedding.weight
    np.testing.assert_array_equal(positions, table.detach().numpy())


@pytest.mark.slow
def test_sparse_checkpoint_of_llava_mods_code_is_imported(
    tmp_path, small_tokenizer, model_logits, torch_logits, random_inputs
):
    """Experts with DeepSpeed's names equal a Qwen2-MoE with a zero shared expert."""
    text = hf.sparse_text(hf.Text(tied=False))
    llava_model = hf.clear_shared_expert(
        hf.llava(text, hf.clip_config(), image_token=small_tokenizer.image_id)
    )
    state = {}
    for name, x in original_names(llava_model.state_dict()).items():
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
    tower.load_state_dict(llava_model.model.vision_tower.state_dict())
    vision = hf.save(tower, tmp_path / "vision")
    config = import_model(str(source), tmp_path / "model", vision=str(vision))
    assert config.decoder.moe_layers == (0, 2)
    assert (config.decoder.moe.num_experts, config.decoder.moe.top_k) == (4, 2)
    tokens, images = random_inputs(config)
    expected = torch_logits(llava_model, tokens, images, config)
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-4
    )


def expert(layer, number, name):
    return f"{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{number}.{name}_proj.weight"
