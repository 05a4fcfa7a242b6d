import json
import pickle
import random
import unicodedata
import warnings

import pytest
import tokenizers
from transformers import AutoTokenizer

from moddistill.data.tokenizer import _with_image, load_tokenizer, train_bpe
from tests.data import qwen_ranks

TEXTS = [
    "Hello world",
    "图片里有一只狗，毛是棕色的。",
    "It's 12:30, isn't it?\n\n  Two  spaces\tand a tab \n",
    "naïve cafe\u0301 e\u0301",  # e with a combining accent: NFC makes it one character
    "😀 👩‍👩‍👧 <b>x</b> {}[]()",
    "   ",
]


def test_qwen_ids_are_the_official_ones(qwen):
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


def test_control_token_that_a_release_does_not_mark_stays_text(small, tmp_path):
    """As `special: false` in `tokenizer.json`, with which text could forge turns."""
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
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.decode([small.special("<|im_end|>")], skip_special_tokens=True) == ""


def test_new_image_token_never_takes_the_id_of_another(small):
    fields = json.loads(small.backend.to_str())
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["content"] != "<image>"]
    vocab = fields["model"]["vocab"]
    moved = next(token for token, i in vocab.items() if i == 100)
    del fields["model"]["vocab"][moved]
    fields["model"]["vocab"][moved] = small.image_id - 1  # the size of the vocabulary now
    fields["model"]["merges"] = []
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["id"] < small.image_id - 1]
    with pytest.raises(ValueError, match=r"no token '<image>', and its next id, \d+, is taken"):
        _with_image(tokenizers.Tokenizer.from_str(json.dumps(fields)))


def test_decoding_leaves_control_tokens_out_or_names_them(qwen):
    ids = [*qwen.encode("yes"), 151645]
    assert qwen.decode(ids) == "yes"
    assert qwen.decode(ids, skip_special=False) == "yes<|im_end|>"


def test_an_unknown_control_token_is_an_error(qwen):
    with pytest.raises(ValueError, match=r"no token '<\|extra_0\|>'"):
        qwen.special("<|extra_0|>")


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_folder_with_vocabulary_and_merges_gives_the_same_ids(qwen, tmp_path):
    qwen_ranks.write_vocabulary(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's imports
        old = load_tokenizer(str(tmp_path))
    assert [old.encode(text) for text in TEXTS] == [qwen.encode(text) for text in TEXTS]
    assert old.image_id == 151646


def test_a_saved_tokenizer_loads_here_and_in_transformers(small, tmp_path):
    small.save(str(tmp_path))
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text) == small.encode(text) == theirs(text)["input_ids"]
        assert theirs.decode(small.encode(text)) == small.decode(small.encode(text))
    assert ours.image_id == theirs.convert_tokens_to_ids("<image>") == small.image_id
    assert theirs("a<image><|im_end|>")["input_ids"][-2:] == [
        small.image_id,
        small.special("<|im_end|>"),
    ]
    assert (theirs.pad_token_id, theirs.eos_token_id) == (small.pad_id, small.pad_id)


def test_a_trained_tokenizer_has_qwens_layout(small):
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    last = small.image_id
    assert [small.special(name) for name in names] == [last - 3, last - 2, last - 1, last]
    assert 259 < last <= 300
    for text in TEXTS:  # bytes that training never saw
        assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)
    assert len(small.encode(" circle")) == 1


def test_training_is_deterministic_and_as_large_as_asked():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(400)]
    texts = [" ".join(generator.choices(words, k=8)) for _ in range(200)]
    first, second = train_bpe(texts, 400), train_bpe(iter(texts), 400)
    assert first.real_ids == ((0, 400),)
    assert first.backend.to_str() == second.backend.to_str()


def test_a_vocabulary_too_small_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size is 200; it must be at least 259"):
        train_bpe(["a"], 200)
