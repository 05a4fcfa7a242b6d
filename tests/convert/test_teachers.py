"""Import of published teachers, at full size and in the published dtypes."""

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoTokenizer

from moddistill.convert.describe import describe
from moddistill.convert.importing import import_model
from moddistill.convert.jinja_template import read_chat_template
from moddistill.convert.sources import open_source
from moddistill.data.examples import encode_prompt
from moddistill.models.presets import preset
from moddistill.models.vlm import ModelConfig
from tests import torch_or_skip as torch
from tests.convert import published

PUBLISHED_PREFIXES = list(published.CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_PREFIXES)
def test_published_config_equals_the_preset_and_all_tensors_have_rules(
    name, qwen_tokenizer, tmp_path
):
    """At full size: the published config; name, shape and dtype of every tensor."""
    folder = published.write_hollow(tmp_path / "hub", name, qwen_tokenizer)
    source = open_source(folder)
    config = ModelConfig(
        source.decoder, source.vision, source.projector, source.template, source.tokenizer.image_id
    )
    assert config == preset(name.split("/")[-1])
    assert config.decoder.vocab_size in (152_000, 152_064)
    assert config.image_token_id == 151_646
    facts = describe(str(folder))
    assert facts["uses"] == ["import", "train", "generate", "evaluate"]
    assert sum(facts["dtypes"].values()) == facts["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_PREFIXES)
def test_logits_of_the_import_equal_transformers(
    name, qwen_tokenizer, tmp_path, torch_logits, model_logits, random_inputs
):
    folder = published.write(tmp_path / "hub", name, qwen_tokenizer)
    config = import_model(str(folder), tmp_path / "model")
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, images = random_inputs(config)
    expected = torch_logits(model.eval(), tokens, images, config)
    assert expected.std() > 0.5
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-4
    )


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize("name", PUBLISHED_PREFIXES)
def test_chatml_equals_the_published_prompt_of_an_image_and_a_question(
    name, qwen_tokenizer, tmp_path
):
    """Compared by token after the system message, which templates of interleave models lack."""
    folder = published.write(tmp_path / "hub", name, qwen_tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = loaded.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=read_chat_template(folder),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text.startswith(SYSTEM) == (name == published.LONG_LLAVA)
    ids = encode_prompt("chatml", [], "<image>\nWhat is it?", 1, qwen_tokenizer, image_tokens=1)
    assert loaded(SYSTEM + text.removeprefix(SYSTEM)).input_ids == ids
