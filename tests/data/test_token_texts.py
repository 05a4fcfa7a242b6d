import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from moddistill.data.token_texts import END, read_token_texts, token_texts
from moddistill.errors import UserError


def test_tokens_of_bytes_have_the_bytes_of_the_text(tokenizer):
    texts = token_texts(tokenizer.backend, "<|endoftext|>")
    text = "a red circle, 图片 \n\t\x7f é"
    ids = tokenizer.encode(text)
    assert b"".join(texts.spell(np.array(ids))) == text.encode()
    end = tokenizer.special("<|endoftext|>")
    assert texts.end == end and texts.spell(np.array([end])) == [END]
    assert texts.controls["<image>"] == tokenizer.image_id
    with pytest.raises(UserError, match="expected text and ends of answers, got id"):
        texts.spell(np.array([tokenizer.image_id]))


def test_every_byte_has_its_token(tokenizer):
    texts = token_texts(tokenizer.backend, None).texts
    assert {bytes([byte]) for byte in range(256)} <= set(texts)


def test_tokens_of_sentencepiece_have_spaces_and_bytes():
    vocabulary = {"<unk>": 0, "<0xE5>": 1, "▁a": 2, "é": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_special_tokens(["<unk>", "</s>"])
    texts = token_texts(backend, "</s>")
    assert texts.texts == [None, b"\xe5", b" a", "é".encode(), None]
    assert (texts.end, texts.controls) == (4, {"<unk>": 0, "</s>": 4})


def test_what_is_saved_is_read(tmp_path, tokenizer):
    texts = token_texts(tokenizer.backend, "<|im_end|>")
    texts.save(tmp_path / "v.json")
    assert read_token_texts(tmp_path / "v.json") == texts
    (tmp_path / "v.json").write_text('{"texts": [3], "controls": {}, "end": 0}')
    with pytest.raises(UserError, match=r"v\.json: expected the texts of a vocabulary"):
        read_token_texts(tmp_path / "v.json")


def test_other_kinds_of_tokens_and_ends_are_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="byte-level or SentencePiece tokens, got none"):
        token_texts(backend, None)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="byte-level or SentencePiece tokens, got WordPiece"):
        token_texts(backend, None)
    with pytest.raises(UserError, match="expected a control token '<end>'"):
        token_texts(backend, "<end>")
