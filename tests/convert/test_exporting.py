import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from moddistill.config import ExpertConfig, UpcycleConfig
from moddistill.convert import companions
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.convert.upcycling import upcycle_model
from moddistill.data.tokenizer import load_tokenizer
from moddistill.inference.answer import Decoding, end_id
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.models.upcycle import upcycle, upcycle_config
from moddistill.params import flatten
from moddistill.storage import orbax_layout
from moddistill.storage.model_folder import read_model_config, save_model
from moddistill.storage.shards import open_checkpoint
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.convert.greedy import answer_in_transformers

GB = 10**9


STUDENTS = ("CLIP and Qwen2", "SigLIP and Qwen2", "CLIP and Qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_sparse_student_loads_in_transformers(
    name, sparse, model_logits, torch_logits, random_inputs
):
    student, out, config = sparse(name)
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kind = "qwen3_moe" if "Qwen3" in name else "qwen2_moe"
    assert model.config.text_config.model_type == kind
    tokens, images = random_inputs(config)
    expected = torch_logits(model.eval(), tokens, images, config)
    assert expected.std() > 0.5
    valid = slice(config.decoder.real_ids[-1][1])
    found = model_logits(student, tokens, images)
    np.testing.assert_allclose(found[..., valid], expected[..., valid], atol=1e-4)


@pytest.mark.parametrize("name", STUDENTS)
def test_greedy_answers_equal_those_of_transformers(name, sparse, small_tokenizer, tmp_path):
    """32 tokens after a question about each of three images, one of them not square."""
    student, out, _ = sparse(name)
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    student_model, params = load(student)
    rng = np.random.default_rng(2)
    for number, shape in enumerate([(30, 30), (12, 12), (20, 33)]):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
        image.save(tmp_path / f"{number}.png")
        prompt = Prompt("<image>\nwhat colour is it?", (str(tmp_path / f"{number}.png"),))
        decoding = Decoding(max_new_tokens=32)
        [mine] = answer(student_model, params, small_tokenizer, [prompt], decoding)
        expected = answer_in_transformers(model, out, image, "what colour is it?", 32)
        assert (mine.prompt_ids, mine.token_ids) == expected
        assert len(set(mine.token_ids)) > 3


def test_language_model_loads_in_transformers(
    tmp_path, small_tokenizer, tiny_architecture, init, model_logits, torch_logits, random_inputs
):
    config = dataclasses.replace(tiny_architecture("tiny", ExpertConfig(top_k=1)), vision=None)
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens, _ = random_inputs(config)
    expected = torch_logits(model, tokens)
    rows = config.decoder.real_ids[-1][1]
    assert expected.shape[-1] == rows
    found = model_logits(tmp_path / "model", tokens)[..., :rows]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_sparse_export_imports_as_the_same_model(sparse, tmp_path, model_logits, random_inputs):
    """The import of an export has the same logits, bit for bit."""
    student, _, config = sparse("CLIP and Qwen2")
    export_model(student, tmp_path / "out", max_shard_size=GB, vocabulary="padded")
    import_model(str(tmp_path / "out"), tmp_path / "again")
    tokens, images = random_inputs(config)
    logits, again = (
        model_logits(folder, tokens, images) for folder in (student, tmp_path / "again")
    )
    np.testing.assert_array_equal(logits, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_export_of_an_imported_sparse_export_has_equal_tensors(name, sparse, tmp_path):
    _, out, _ = sparse(name)
    import_model(str(out), tmp_path / "again")
    export_model(tmp_path / "again", tmp_path / "back", max_shard_size=GB)
    imported, exported = open_checkpoint(tmp_path / "back"), open_checkpoint(out)
    assert imported.keys() == exported.keys()
    for key, tensor in exported.items():
        assert imported[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(imported[key].read(), tensor.read(), err_msg=key)


def test_export_casts_to_a_smaller_dtype(sparse, tmp_path):
    student, _, _ = sparse("CLIP and Qwen2")
    fields = export_model(student, tmp_path / "out", max_shard_size=GB, dtype="bfloat16")
    assert fields["dtype"] == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_upcycled_folder_computes_the_same_logits_as_the_dense_one(
    sparse, model_logits, random_inputs
):
    student, _, config = sparse("CLIP and Qwen2")
    tokens, images = random_inputs(config)
    dense, copies = student.parent / "dense", student.parent / "copies"
    np.testing.assert_allclose(
        model_logits(copies, tokens, images), model_logits(dense, tokens, images), atol=1e-5
    )


def test_large_matrices_of_a_stage_are_read_in_blocks(
    tmp_path, tiny_architecture, init, small_tokenizer, monkeypatch
):
    """With blocks of 1 MiB, embedding and head have several chunks and are never one array."""
    monkeypatch.setattr(orbax_layout, "_LARGEST_BLOCK", 2**20)
    decoder = dataclasses.replace(
        tiny_architecture().decoder,
        vocab_size=49_152,
        tie_word_embeddings=False,
        real_ids=((0, 296),),
    )
    config = dataclasses.replace(tiny_architecture(), decoder=decoder, vision=None)
    params = init(config)
    save_model(tmp_path / "model", config, params, small_tokenizer, {})
    sizes = []
    read = orbax_layout.Reader.read

    def noted(self, path, index=()):
        array = read(self, path, index)
        sizes.append(array.nbytes)
        assert not isinstance(self.opened[1], np.ndarray) or self.opened[1].nbytes <= 2**20
        return array

    monkeypatch.setattr(orbax_layout.Reader, "read", noted)
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB, vocabulary="padded")
    upcycle_model(tmp_path / "model", tmp_path / "sparse", ExpertConfig())
    assert max(sizes) == 2**20
    out = open_checkpoint(tmp_path / "out")
    head = params["decoder"]["head"]
    np.testing.assert_array_equal(out["lm_head.weight"].read(), head)
    np.testing.assert_array_equal(load(tmp_path / "sparse")[1]["decoder"]["head"], head)


@pytest.mark.parametrize(
    ("moe", "how"),
    [
        (ExpertConfig(num_experts=3, placement=(1, 2)), UpcycleConfig()),
        (ExpertConfig(), UpcycleConfig("noise", noise_std=0.1)),
        (ExpertConfig(), UpcycleConfig("drop", drop_fraction=0.5)),
        (ExpertConfig(num_experts=4, moe_intermediate_size=16), UpcycleConfig()),
    ],
    ids=["copy", "noise", "drop", "slices"],
)
def test_upcycled_folder_equals_upcycling_in_memory(moe, how, tmp_path, tiny_models):
    config = upcycle_model(tiny_models["dense"], tmp_path / "sparse", moe, how, seed=3)
    assert config == upcycle_config(read_model_config(tiny_models["dense"]), moe)
    dense = load(tiny_models["dense"])[1]
    expected = flatten(upcycle(dense, config, jax.random.key(3), how))
    found = flatten(load(tmp_path / "sparse")[1])
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (ExpertConfig(residual=True), "moe.residual: expected false, .*, got True"),
        (
            ExpertConfig(dispatch="capacity"),
            "dispatch: expected 'dropless', .*, got 'capacity'",
        ),
    ],
)
def test_models_that_transformers_cannot_compute_are_not_exported(
    moe, message, tmp_path, tiny_architecture, init, small_tokenizer
):
    config = tiny_architecture("tiny", moe)
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    assert not (tmp_path / "out").exists()


def test_projector_that_llava_does_not_have_is_not_exported(
    tmp_path, tiny_architecture, init, small_tokenizer
):
    config = dataclasses.replace(tiny_architecture("tiny"), projector="mlp3x_gelu")
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    with pytest.raises(ValueError, match=r"got 2 others, such as 'projector/linear_2/"):
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)


def test_exported_tokenizer_loads_in_transformers(sparse, small_tokenizer):
    _, out, _ = sparse("CLIP and Qwen2")
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("a red circle").input_ids == small_tokenizer.encode("a red circle")
    assert loaded.eos_token == "<|im_end|>"


def test_plain_answers_end_with_a_line_break(tmp_path, tiny_architecture, init, small_tokenizer):
    config = dataclasses.replace(tiny_architecture(), template="plain")
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    general = small_tokenizer.special("<|endoftext|>")
    assert ends == [general, end_id("plain", small_tokenizer)]


def test_image_token_without_a_row_is_not_in_the_exported_tokenizer(
    tmp_path, small_tokenizer, model_logits
):
    """Text that contains `<image>` has the same ids in both tokenizers, all with a row."""
    rows = small_tokenizer.image_id
    source = hf.save(hf.Text(num_layers=1, rows=rows).model(), tmp_path / "hf", small_tokenizer)
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("say <image> please", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
        expected = model(**inputs).logits.numpy()
    tokens = inputs["input_ids"].numpy()
    assert tokens[0].tolist() == small_tokenizer.encode("say <image> please")
    np.testing.assert_allclose(model_logits(tmp_path / "model", tokens), expected, atol=1e-4)
    assert len(tokenizer) == rows
    import_model(str(tmp_path / "out"), tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert again.backend.get_vocab() == small_tokenizer.backend.get_vocab()


def test_image_token_is_removed_from_the_vocabulary_too(tmp_path, small_tokenizer):
    """Some tokenizers list their added tokens twice."""
    small_tokenizer.save(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"]["<image>"] = small_tokenizer.image_id
    file.write_text(json.dumps(fields))
    companions._remove_token(file, "<image>")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.get_vocab().keys() == small_tokenizer.backend.get_vocab().keys() - {"<image>"}
