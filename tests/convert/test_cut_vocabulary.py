"""Exports without embedding rows that are no tokens."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moddistill.convert.cut_vocabulary import write_mean_rows
from moddistill.convert.exporting import export_model
from moddistill.storage import orbax_layout
from moddistill.storage.model_folder import save_model
from moddistill.storage.shards import open_checkpoint
from tests import torch_or_skip as torch

GB = 10**9


@pytest.fixture(scope="module")
def export(tmp_path_factory, tiny_architecture, random_params, small_tokenizer):
    """Returns a function for the parameters and the tensors of an exported model."""

    def make(vision=True, tied=False, rows=320, dtype="", **options):
        root = tmp_path_factory.mktemp("export")
        config = tiny_architecture("tiny")
        real_ids, image_id = small_tokenizer.real_ids, small_tokenizer.image_id
        decoder = dataclasses.replace(
            config.decoder, vocab_size=rows, real_ids=real_ids, tie_word_embeddings=tied
        )
        config = dataclasses.replace(
            config,
            decoder=decoder,
            image_token_id=image_id,
            vision=config.vision if vision else None,
            template="chatml",
        )
        params = random_params(config)
        save_model(root / "model", config, params, small_tokenizer, {})
        export_model(root / "model", root / "out", max_shard_size=GB, dtype=dtype, **options)
        return params["decoder"], open_checkpoint(root / "out"), root / "out"

    return make


def test_rows_of_tokens_are_unchanged_and_that_of_the_image_is_their_mean(export, small_tokenizer):
    params, tensors, out = export()
    count = small_tokenizer.image_id
    head = tensors["language_model.lm_head.weight"].read()
    table = tensors["language_model.model.embed_tokens.weight"].read()
    assert head.shape == table.shape == (count + 1, head.shape[1])
    np.testing.assert_array_equal(head[:count], params["head"][:count])
    np.testing.assert_array_equal(table, params["embedding"][: count + 1])
    np.testing.assert_allclose(head[count], np.mean(params["head"][:count], axis=0), atol=1e-7)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == config["image_token_index"] + 1 == count + 1


def test_image_token_is_never_the_most_probable_nor_above_an_equal_share(export):
    """For any hidden state: its logit is a mean of the others."""
    _, tensors, _ = export()
    head = tensors["language_model.lm_head.weight"].read()
    hidden = np.random.default_rng(0).standard_normal((10_000, head.shape[1]))
    logits = 4 * hidden @ head.T.astype(np.float64)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    share = probability[:, -1] / probability.sum(axis=1)
    assert np.all(np.argmax(logits, axis=1) < len(head) - 1)
    assert np.max(share) <= 1 / (len(head) - 1)
    assert np.median(share) < 1e-3


def test_tied_head_is_cut_once(export, small_tokenizer):
    params, tensors, _ = export(tied=True, dtype="bfloat16")
    count = small_tokenizer.image_id
    table = tensors["language_model.model.embed_tokens.weight"].read()
    assert "language_model.lm_head.weight" not in tensors
    expected = np.asarray(params["embedding"][:count])
    np.testing.assert_array_equal(table[:count], expected.astype(table.dtype))
    mean = np.mean(table[:count].astype(np.float32), axis=0)
    np.testing.assert_array_equal(table[count], mean.astype(table.dtype))


def test_language_model_has_exactly_the_rows_of_its_tokens(export, small_tokenizer):
    _, tensors, out = export(vision=False)
    count = small_tokenizer.image_id
    assert tensors["lm_head.weight"].shape[0] == count
    assert len(AutoTokenizer.from_pretrained(out)) == count


def test_language_model_without_the_row_of_an_image_generates_in_transformers(export):
    _, _, out = export(vision=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.load_module()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.suppress_tokens is None
    inputs = tokenizer("say <image> please", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)


def test_padded_vocabulary_is_written_as_stored_with_suppressed_rows(export, small_tokenizer):
    params, tensors, out = export(vocabulary="padded")
    head = tensors["language_model.lm_head.weight"].read()
    np.testing.assert_array_equal(head, params["head"])
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(range(small_tokenizer.image_id, 320))


def test_vocabulary_of_several_chunks_is_cut_within_one(export, small_tokenizer, monkeypatch):
    """Chunks of 1 MiB are 16,384 rows; the last row of a token is in the first of three."""
    monkeypatch.setattr(orbax_layout, "_LARGEST_BLOCK", 2**20)
    params, tensors, _ = export(rows=49_152, vision=False)
    rows = small_tokenizer.image_id
    np.testing.assert_array_equal(tensors["lm_head.weight"].read(), params["head"][:rows])


def test_nothing_is_replaced_where_every_row_is_a_token(tiny_architecture):
    decoder = dataclasses.replace(tiny_architecture().decoder, vocab_size=8, real_ids=((0, 8),))
    config = dataclasses.replace(tiny_architecture(), decoder=decoder, vision=None)
    assert write_mean_rows([], {}, config) == []


def test_tokenizer_with_more_ids_than_the_model_was_trained_with_is_not_cut(
    tmp_path, tiny_architecture, random_params, small_tokenizer
):
    config = tiny_architecture("tiny")
    decoder = dataclasses.replace(config.decoder, real_ids=((0, 200),))
    config = dataclasses.replace(config, decoder=decoder, image_token_id=small_tokenizer.image_id)
    save_model(tmp_path / "model", config, random_params(config), small_tokenizer, {})
    with pytest.raises(ValueError) as error:
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB)
    assert str(error.value) == (
        f"--vocabulary: expected padded, as the tokenizer has ids up to "
        f"{small_tokenizer.image_id - 1}, and the model was trained with ids up to 199 of its "
        f"{decoder.vocab_size} rows, got cut"
    )
    assert not (tmp_path / "out").exists()


def test_unknown_vocabulary_is_refused(export):
    with pytest.raises(ValueError, match=r"--vocabulary: expected one of .*did you mean 'cut'"):
        export(vocabulary="cutt")


def test_changes_are_one_line(export, small_tokenizer, caplog):
    caplog.set_level(logging.INFO, "moddistill")
    export(vision=False, dtype="bfloat16")
    [line] = caplog.messages
    rows = small_tokenizer.image_id
    assert line.endswith(f"model: all weights as bfloat16, vocabulary 320 -> {rows} rows")
    export(vocabulary="padded")
    assert caplog.messages[1].endswith("model: nothing")
