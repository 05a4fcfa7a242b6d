import json
import pickle
import random
import unicodedata
import warnings

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moddistill.data.tokenizer import Tokenizer, _with_image, load_tokenizer, train_bpe
from tests.data import qwen_ranks

TEXTS = [
    "Hello world",
    "图片里有一只狗，毛是棕色的。",
    "It's 12:30, isn't it?\n\n  Two  spaces\tand a tab \n",
    "naïve cafe\u0301 e\u0301",  # e with a combining accent: NFC makes it one character
    "😀 👩‍👩‍👧 <b>x</b> {}[]()",
    "   ",
]


def test_qwen_ids_equal_the_published_ones(qwen):
    assert qwen.encode("Hello world") == [9707, 1879]
    assert qwen.special("<|im_end|>") == 151645
    assert (qwen.pad_id, qwen.image_id, qwen.real_ids) == (151643, 151646, ((0, 151646),))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_tiktoken(text, qwen):
    normal = unicodedata.normalize("NFC", text)
    assert qwen.encode(text) == qwen_ranks.oracle().encode(normal)
    assert qwen.decode(qwen.encode(text)) == normal


def test_ids_equal_those_of_tiktoken_on_random_text(qwen):
    characters = "ab zA1 9.,!?'\"\n\t狗的。é🙂<|>_-"
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices(characters, k=generator.randrange(40)))
        assert qwen.encode(text) == qwen_ranks.oracle().encode(text), text


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
def test_control_tokens_written_in_text_stay_text(token, qwen, small):
    for tokenizer in (qwen, small, pickle.loads(pickle.dumps(small))):
        ids = tokenizer.encode(f"say {token} now")
        assert tokenizer.special(token) not in ids
        assert tokenizer.decode(ids) == f"say {token} now"


def test_control_tokens_not_marked_special_in_the_file_stay_text(small, tmp_path):
    """With `special: false` in `tokenizer.json`, text could forge turns."""
    small.save(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    for token in fields["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(fields))
    loaded = load_tokenizer(str(tmp_path))
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"):
        ids = loaded.encode(f"say {token} now")
        assert loaded.special(token) not in ids
        assert loaded.decode(ids) == f"say {token} now"
    loaded.save(str(tmp_path))
    reloaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert reloaded.decode([small.special("<|im_end|>")], skip_special_tokens=True) == ""


def test_new_image_token_never_shares_the_id_of_another_token(small):
    fields = json.loads(small.backend.to_str())
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["content"] != "<image>"]
    vocab = fields["model"]["vocab"]
    moved = next(token for token, i in vocab.items() if i == 100)
    del fields["model"]["vocab"][moved]
    fields["model"]["vocab"][moved] = small.image_id - 1  # the size of the vocabulary now
    fields["model"]["merges"] = []
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["id"] < small.image_id - 1]
    with pytest.raises(
        ValueError, match=r"a token '<image>' or ids without gaps, .*next id, \d+, is"
    ):
        _with_image(tokenizers.Tokenizer.from_str(json.dumps(fields)))


def test_decoding_drops_control_tokens_or_writes_their_names(qwen):
    ids = [*qwen.encode("yes"), 151645]
    assert qwen.decode(ids) == "yes"
    assert qwen.decode(ids, skip_special=False) == "yes<|im_end|>"


def test_unknown_control_token_is_an_error(qwen):
    with pytest.raises(ValueError, match=r"expected a token '<\|extra_0\|>', got none"):
        qwen.special("<|extra_0|>")


def test_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected tokenizer\.json, or vocab\.json with merges\.txt"
    ):
        load_tokenizer(str(tmp_path))


def test_vocabulary_and_merges_give_the_same_ids_as_tokenizer_json(qwen, tmp_path):
    qwen_ranks.write_vocabulary(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imported packages
        loaded = load_tokenizer(str(tmp_path))
    assert [loaded.encode(text) for text in TEXTS] == [qwen.encode(text) for text in TEXTS]
    assert loaded.image_id == 151646


def test_saved_tokenizer_loads_here_and_in_transformers(small, tmp_path):
    small.save(str(tmp_path))
    reloaded = load_tokenizer(str(tmp_path))
    in_transformers = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert reloaded.encode(text) == small.encode(text) == in_transformers(text)["input_ids"]
        assert in_transformers.decode(small.encode(text)) == small.decode(small.encode(text))
    assert reloaded.image_id == in_transformers.convert_tokens_to_ids("<image>") == small.image_id
    assert in_transformers("a<image><|im_end|>")["input_ids"][-2:] == [
        small.image_id,
        small.special("<|im_end|>"),
    ]
    assert (in_transformers.pad_token_id, in_transformers.eos_token_id) == (
        small.pad_id,
        small.pad_id,
    )


def test_trained_tokenizer_has_the_layout_of_qwen(small):
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    last = small.image_id
    assert [small.special(name) for name in names] == [last - 3, last - 2, last - 1, last]
    assert 259 < last <= 300
    for text in TEXTS:  # bytes absent from the training texts
        assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)
    assert len(small.encode(" circle")) == 1


def test_training_is_deterministic_and_reaches_the_vocabulary_size():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(400)]
    texts = [" ".join(generator.choices(words, k=8)) for _ in range(200)]
    first, second = train_bpe(texts, 400), train_bpe(iter(texts), 400)
    assert first.real_ids == ((0, 400),)
    assert first.backend.to_str() == second.backend.to_str()


def test_vocabulary_too_small_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size: expected >= 259, got 200"):
        train_bpe(["a"], 200)


@given(st.text("ab1 .,'\"\n\t\r\x0b\x1c\u00a0\u3000\u200b狗é\u0301🙂<|>_", max_size=60))
def test_count_is_the_number_of_ids(qwen, small, text):
    for tokenizer in (qwen, small):
        assert tokenizer.count(text) == len(tokenizer.encode(text)), text


ADDED = {
    "two words": {},
    "<left>": {"lstrip": True},
    "<right>": {"rstrip": True},
    "<none>": {},
}


@pytest.mark.parametrize("token", ADDED)
@pytest.mark.parametrize("splits", [True, False])
def test_count_is_the_number_of_ids_with_added_tokens_and_without_words(splits, token, small):
    """Added tokens that are not special occur in text, and may contain or remove spaces."""
    fields = json.loads(small.backend.to_str())
    if not splits:
        fields["pre_tokenizer"] |= {"type": "ByteLevel", "use_regex": False}
        fields["pre_tokenizer"] |= {"add_prefix_space": False, "trim_offsets": False}
        fields["model"]["merges"].append(["a", "\u0120"])  # a merge over the end of a word
        fields["model"]["vocab"]["a\u0120"] = small.image_id + 1
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    backend.add_tokens([tokenizers.AddedToken(token, **ADDED[token])])
    tokenizer = Tokenizer(backend)
    for text in ("a b", f"a {token} b", f"x  {token}  y", f"a{token}b c", "a two words b"):
        assert tokenizer.count(text) == len(tokenizer.encode(text)), text


def test_number_and_length_of_saved_parts_are_limited(small, monkeypatch):
    monkeypatch.setattr("moddistill.data.tokenizer._MOST_PARTS", 2)
    counting = Tokenizer(small.backend)
    for text in ("long " + "x" * 100, "a b c d", "a b c d", "e f"):
        assert counting.count(text) == len(small.encode(text))
    assert list(counting._lengths) == ["long", "a"]
