"""Only tokenizer files in Qwen's format are read."""

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from moddistill.data.tokenizer import load_tokenizer
from moddistill.data.tokenizer_file import library_errors
from moddistill.errors import UserError

TEXT = "a red circle, isn't it?\n  yes 12 狗 cafe\u0301"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
BROKEN = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}


def write(tokenizer, folder, **changes):
    """Writes the tokenizer with changed fields, of its model too; returns the folder."""
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
def test_equivalent_forms_of_the_qwen_format_are_read(changes, small, tmp_path):
    loaded = load_tokenizer(write(small, tmp_path, **changes))
    assert loaded.encode(TEXT) == small.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == small.decode(small.encode(TEXT))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoTokenizer, Qwen2Tokenizer])
def test_files_that_transformers_saves_are_read(kind, qwen, tmp_path):
    qwen.save(str(tmp_path / "saved"))
    loaded = kind.from_pretrained(str(tmp_path / "saved"))
    loaded("a", truncation=True, max_length=3, padding="max_length")  # is saved along with it
    loaded.save_pretrained(str(tmp_path / "loaded"))
    assert load_tokenizer(str(tmp_path / "loaded")).encode(TEXT) == qwen.encode(TEXT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": BROKEN}, "normalizer.type: expected null or NFC, got 'Precompiled'"),
        (
            {"normalizer": {"type": "Lowercase"}},
            "normalizer.type: expected null or NFC, got 'Lowercase'",
        ),
        (
            {"pre_tokenizer": None},
            "pre_tokenizer.type: expected ByteLevel or Split + ByteLevel, got 'null'",
        ),
        (
            {"post_processor": 3},
            "post_processor.type: expected null or ByteLevel or TemplateProcessing, got '3'",
        ),
        ({"decoder": {"type": "Fuse"}}, "decoder.type: expected ByteLevel, got 'Fuse'"),
        ({"model": {"dropout": 0.5}}, "model.dropout: expected null, got 0.5"),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges: expected null, got True"),
        ({"model": {"type": "WordLevel"}}, "model.type: expected 'BPE', got 'WordLevel'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_tokenizer_formats_are_refused(changes, message, small, tmp_path):
    with pytest.raises(ValueError) as raised:
        load_tokenizer(write(small, tmp_path, **changes))
    assert str(raised.value).startswith(f"{tmp_path / 'tokenizer.json'}: {message}")
    assert "\n" not in str(raised.value)


def test_rust_panic_of_the_library_is_a_user_error_of_one_line(small):
    fields = json.loads(small.backend.to_str()) | {"normalizer": BROKEN}
    message = r"^file: .+; expected less$"
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    with (
        pytest.raises(ValueError, match=message) as raised,
        library_errors("file: ", "; expected less"),
    ):
        backend.encode("a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, TimeoutError, MemoryError])
def test_interruptions_and_resource_errors_pass_through_unchanged(kind):
    with pytest.raises(kind), library_errors("file: "):
        raise kind


def with_added(fields, **ids):
    """Returns the added tokens of a tokenizer file with other ids, or with more tokens."""
    known = {token["content"]: token for token in fields["added_tokens"]}
    like = next(iter(known.values()))
    for content, number in ids.items():
        known[content] = known.get(content, like | {"content": content}) | {"id": number}
    return list(known.values())


@pytest.mark.parametrize(
    "ids", [{"<|im_start|>": 302}, {"<|late|>": 310}, {"<|": 301, "<|late|>": 309}]
)
def test_added_tokens_that_the_library_would_renumber_are_refused(ids, small, tmp_path):
    fields = json.loads(small.backend.to_str())
    with pytest.raises(UserError, match=r"expected token '.*' at its id \d+, got \d+ when loaded"):
        load_tokenizer(write(small, tmp_path, added_tokens=with_added(fields, **ids)))


def write_vocabulary(tokenizer, folder, **config):
    """Writes `vocab.json`, `merges.txt` and their settings; returns all fields."""
    fields = json.loads(tokenizer.backend.to_str())
    (folder / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    merges = fields["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {"tokenizer_class": "Qwen2Tokenizer"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return fields


@pytest.mark.parametrize("number", [5, 298])
def test_ids_of_added_tokens_json_are_checked(number, small, tmp_path):
    """5 is the id of a byte, 298 that of another added token."""
    fields = write_vocabulary(small, tmp_path)
    ids = {token["content"]: token["id"] for token in fields["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    load_tokenizer(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids | {"<|x|>": number}))
    with pytest.raises(UserError, match=r"expected one token per id, got 2 with|at its id"):
        load_tokenizer(str(tmp_path))


def test_an_id_of_thousands_of_digits_is_refused(small, tmp_path):
    write_vocabulary(small, tmp_path, added_tokens_decoder={"9" * 5000: {"content": "x"}})
    with pytest.raises(UserError, match=r"added_tokens_decoder: expected a token by its id, got"):
        load_tokenizer(str(tmp_path))


def test_files_next_to_a_vocabulary_that_are_not_checked_are_not_read(small, tmp_path, monkeypatch):
    write_vocabulary(small, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * 100)
    seen = []
    load = AutoTokenizer.from_pretrained

    def from_pretrained(folder, **options):
        seen.extend(sorted(path.name for path in Path(folder).iterdir()))
        return load(folder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(str(tmp_path))
    assert seen == ["merges.txt", "tokenizer_config.json", "vocab.json"]
