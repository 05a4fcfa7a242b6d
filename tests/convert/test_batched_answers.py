"""Padded batches in `transformers` give the answers of single prompts."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.storage.model_folder import save_model
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf

GB = 10**9
LENGTH = 16
QUESTIONS = (
    "yes?",
    "what colour is the circle?",
    "what colour is the shape? a red circle, no triangle. what colour is it?",
)


def generate(model, inputs):
    """Greedy answers up to their end."""
    with torch.no_grad():
        rows = model.generate(**inputs, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :]
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows.tolist()]


def chat(processor, question, images):
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def assert_batch_is_singles(inputs, model):
    """Returns the answers to three prompts, prepared by `inputs(rows)`."""
    everything = inputs([0, 1, 2])
    assert everything["attention_mask"].sum(1).unique().numel() == 3
    assert everything["attention_mask"][:, -1].all()
    answers = generate(model, everything)
    assert answers == [generate(model, inputs([row]))[0] for row in range(3)]
    assert len({tuple(row) for row in answers}) == 3
    return answers


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("image_files"), np.random.default_rng(2)
    paths = [str(folder / f"{number}.png") for number in range(3)]
    for path, shape in zip(paths, [(30, 30), (12, 12), (20, 33)], strict=True):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory, small_tokenizer, sparse):
    """`multimodal(name)`: a model folder and its export."""

    def make(name):
        if name.startswith("sparse "):
            return sparse(name.removeprefix("sparse "))[:2]
        root = tmp_path_factory.mktemp("dense")
        model = hf.multimodal(f"{name}, untied", small_tokenizer.image_id)
        import_model(str(hf.save(model, root / "hf", small_tokenizer)), root / "model")
        export_model(root / "model", root / "out", max_shard_size=GB)
        return root / "model", root / "out"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["CLIP and Qwen2", "SigLIP and Qwen3", "sparse CLIP and Qwen2", "sparse SigLIP and Qwen2"],
)
def test_batched_answers_about_images_equal_single_ones(
    name, multimodal, image_files, small_tokenizer
):
    """Processor, padding and generation settings are those of the exported folder."""
    folder, out = multimodal(name)
    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    images = [Image.open(path) for path in image_files]

    def inputs(rows):
        return processor(
            images=[images[row] for row in rows],
            text=[chat(processor, QUESTIONS[row], 1) for row in rows],
            padding=True,
            return_tensors="pt",
        )

    answers = assert_batch_is_singles(inputs, model)
    prompts = [
        Prompt(f"<image>\n{question}", (path,))
        for question, path in zip(QUESTIONS, image_files, strict=True)
    ]
    expected = answer(*load(folder), small_tokenizer, prompts, Decoding(max_new_tokens=LENGTH))
    assert answers == [found.token_ids for found in expected]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, ExpertConfig()], ids=["dense", "sparse"])
def test_batched_answers_of_a_language_model_equal_single_ones(
    moe, tmp_path, tiny_architecture, init, small_tokenizer
):
    config = tiny_architecture("tiny", moe) if moe else tiny_architecture("tiny")
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=False)
    config = dataclasses.replace(config, vision=None, decoder=decoder, template="chatml")
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.load_module()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    def inputs(rows):
        texts = [chat(tokenizer, QUESTIONS[row], 0) for row in rows]
        return tokenizer(texts, padding=True, return_tensors="pt")

    answers = assert_batch_is_singles(inputs, model)
    expected = answer(
        *load(tmp_path / "model"),
        small_tokenizer,
        [Prompt(question, ()) for question in QUESTIONS],
        Decoding(max_new_tokens=LENGTH),
    )
    assert answers == [found.token_ids for found in expected]


def test_tokenizer_outputs_only_inputs_of_decoders(multimodal):
    """Releases before 5 return `token_type_ids` too unless the tokenizer states its inputs."""
    _, out = multimodal("CLIP and Qwen2")
    stated = json.loads((out / "tokenizer_config.json").read_text())
    assert stated["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    settings = GenerationConfig.from_pretrained(out)
    assert tokenizer.pad_token_id == settings.pad_token_id
    assert tokenizer.eos_token_id == settings.eos_token_id
