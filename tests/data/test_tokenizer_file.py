"""Which tokenizer files are read: those in Qwen's format, and no others."""

import json

import pytest
import tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from moddistill.data.tokenizer import load_tokenizer
from moddistill.data.tokenizer_file import in_words
from moddistill.errors import UserError

TEXT = "a red circle, isn't it?\n  yes 12 狗 cafe\u0301"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
BROKEN = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}


def write(tokenizer, folder, **changes):
    """The tokenizer's file with some fields, or some of its model, replaced."""
    fields = json.loads(tokenizer.backend.to_str())
    fields["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(fields | changes))
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"post_processor": BYTES},
        {"post_processor": {"type": "Sequence", "processors": []}},
        {"decoder": BYTES},
        {"model": {"continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": None}},
        {"padding": {"strategy": {"Fixed": 3}, "direction": "Left", "pad_id": 1}},
        {"truncation": {"max_length": 2, "stride": 0, "strategy": "LongestFirst"}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_forms_that_mean_the_same_are_read(changes, small, tmp_path):
    loaded = load_tokenizer(write(small, tmp_path, **changes))
    assert loaded.encode(TEXT) == small.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == small.decode(small.encode(TEXT))


@pytest.mark.parametrize("kind", [AutoTokenizer, Qwen2Tokenizer])
def test_files_that_transformers_saves_are_read(kind, qwen, tmp_path):
    qwen.save(str(tmp_path / "ours"))
    theirs = kind.from_pretrained(str(tmp_path / "ours"))
    theirs("a", truncation=True, max_length=3, padding="max_length")  # is saved along with it
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert load_tokenizer(str(tmp_path / "theirs")).encode(TEXT) == qwen.encode(TEXT)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalizer": BROKEN}, "normalizer is of type 'Precompiled'; accepted: null or NFC"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is of type 'Lowercase'; accepted: "),
        ({"pre_tokenizer": None}, "pre_tokenizer is of type 'null'; accepted: ByteLevel or Split"),
        ({"post_processor": 3}, "post_processor is of type '3'; accepted: null or ByteLevel or "),
        ({"decoder": {"type": "Fuse"}}, "decoder is of type 'Fuse'; accepted: ByteLevel"),
        ({"model": {"dropout": 0.5}}, "model.dropout is 0.5; accepted: null"),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges is True; accepted: null"),
        ({"model": {"type": "WordLevel"}}, "model.type is 'WordLevel'; accepted: 'BPE'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_kinds_of_tokenizer_are_refused(changes, words, small, tmp_path):
    with pytest.raises(ValueError) as raised:
        load_tokenizer(write(small, tmp_path, **changes))
    assert str(raised.value).startswith(f"{tmp_path / 'tokenizer.json'}: {words}")
    assert "\n" not in str(raised.value)


def test_a_panic_of_the_library_is_an_error_of_one_line(small):
    fields = json.loads(small.backend.to_str()) | {"normalizer": BROKEN}
    words = r"^file: .+; accepted: less$"
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    with (
        pytest.raises(ValueError, match=words) as raised,
        in_words("file: ", "; accepted: less"),
    ):
        backend.encode("a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, TimeoutError, MemoryError])
def test_interruptions_are_not_taken_for_errors_of_the_library(kind):
    with pytest.raises(kind), in_words("file: "):
        raise kind


def with_added(fields, **ids):
    """A tokenizer file in which added tokens have other ids, or there are more of them."""
    known = {token["content"]: token for token in fields["added_tokens"]}
    like = next(iter(known.values()))
    for content, number in ids.items():
        known[content] = known.get(content, like | {"content": content}) | {"id": number}
    return list(known.values())


@pytest.mark.parametrize(
    "ids", [{"<|im_start|>": 302}, {"<|late|>": 310}, {"<|": 301, "<|late|>": 309}]
)
def test_added_tokens_that_would_be_numbered_anew_are_refused(ids, small, tmp_path):
    fields = json.loads(small.backend.to_str())
    with pytest.raises(UserError, match=r"expected token '.*' at its id \d+, got \d+ when loaded"):
        load_tokenizer(write(small, tmp_path, added_tokens=with_added(fields, **ids)))


@pytest.mark.parametrize("number", [5, 298])
def test_ids_of_added_tokens_json_are_checked(number, small, tmp_path):
    """5 is the id of a byte, 298 that of another added token."""
    fields = json.loads(small.backend.to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    merges = fields["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    ids = {token["content"]: token["id"] for token in fields["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    load_tokenizer(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids | {"<|x|>": number}))
    with pytest.raises(UserError, match=r"2 tokens have the id|at its id"):
        load_tokenizer(str(tmp_path))
