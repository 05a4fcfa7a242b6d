"""Tokenizer: byte-level BPE in Qwen's format, with a control token `<image>` of any id.

Text and control tokens are encoded by different methods, so text never becomes a control token.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from moddistill.data.chat_template import END_OF_TEXT, IM_END, IM_START
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer_file import (
    COMPONENTS,
    SETTINGS,
    WORD_PATTERN,
    added_ids,
    check_components,
    check_ids,
    check_loaded_ids,
    check_merges,
    library_errors,
    only_checked_files,
    read_fields,
)
from moddistill.errors import UserError, invalid
from moddistill.models.vocabulary import IdRanges, id_ranges
from moddistill.storage.digests import verify
from moddistill.storage.json_file import write_json

# Control tokens of templates and samples.
CONTROLS = (END_OF_TEXT, IM_START, IM_END, IMAGE)

# A part of a text, up to the next space before a visible character. There a word begins, whatever
# comes before it, and bytes are merged within words only.
_PART = re.compile(r"(?s:.)[^ ]*(?: (?!\S)[^ ]*)*")
_MOST_PARTS, _LONGEST_PART = 2**17, 32  # whose lengths are saved, in about 20 MB


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    `image_id` is the placeholder of an image patch; `pad_id` is the padding, which is masked.
    """

    backend: tokenizers.Tokenizer

    def __post_init__(self):
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        required = {END_OF_TEXT, IMAGE}
        for token in CONTROLS:
            exists = token in required or self.backend.token_to_id(token) is not None
            if exists and self.special(token) in self.encode(token):
                raise UserError(f"tokenizer: expected {token!r} in text to stay text, got its id")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; control tokens written in it are encoded as characters."""
        return list(_encode(self.backend, text))

    def count(self, text: str) -> int:
        """Returns the number of ids of a text, in a fraction of the time of `encode`."""
        parts = _PART.findall(text) if self._divides_at_spaces else [text]
        return sum(map(self._lengths.__getitem__, parts))

    @functools.cached_property
    def _lengths(self) -> "_PartLengths":
        return _PartLengths(self.backend)

    @functools.cached_property
    def _divides_at_spaces(self) -> bool:
        """Whether the ids of a text are those of its parts."""
        splitter = self.backend.pre_tokenizer
        added = self.backend.get_added_tokens_decoder().values()
        # Those that are special do not occur in text.
        found = [token for token in added if not token.special]
        return len(splitter.pre_tokenize_str("a b")) == 2 and not any(
            " " in token.content or token.lstrip or token.rstrip for token in found
        )

    def special(self, token: str) -> int:
        """Returns the id of a control token.

        Raises:
          UserError: the vocabulary has no such token.
        """
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer: expected a token {token!r}, got none")
        return token_id

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of ids; control tokens are dropped, or written by name."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def image_id(self) -> int:
        return self.special(IMAGE)

    @property
    def pad_id(self) -> int:
        return self.special(END_OF_TEXT)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that encoding depends on."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @functools.cached_property
    def real_ids(self) -> IdRanges:
        """Ranges of the ids that a language model may generate: all tokens but `<image>`."""
        return id_ranges(set(self.backend.get_vocab().values()) - {self.image_id})

    @property
    def special_tokens(self) -> set[str]:
        """Names of all control tokens; encoding text never produces them."""
        added = self.backend.get_added_tokens_decoder().values()
        return {token.content for token in added if token.special}

    def save(self, folder: str) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers` loads."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(target / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            # Left, so that generated tokens follow the prompt directly in a batch.
            "padding_side": "left",
            # transformers < 5 adds token_type_ids by default, which decoders reject.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        write_json(target / "tokenizer_config.json", config)

    def __reduce__(self):
        # Pickling the backend loses `encode_special_tokens`, which `__post_init__` sets.
        return _from_json, (self.backend.to_str(),)


class _PartLengths(dict[str, int]):
    """Number of ids of each part of a text; a few parts are most of all text."""

    def __init__(self, backend: tokenizers.Tokenizer):
        super().__init__()
        self._backend = backend

    def __missing__(self, part: str) -> int:
        length = len(self._backend.encode(part, add_special_tokens=False))
        if len(self) < _MOST_PARTS and len(part) <= _LONGEST_PART:
            self[part] = length
        return length


# Cached, since the fixed texts of a template are most of a short sample.
@functools.lru_cache(maxsize=4096)
def _encode(backend: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def load_tokenizer(folder: str) -> Tokenizer:
    """Loads the tokenizer of a local folder; adds `<image>` if it has none.

    Control tokens that a release does not mark as special are marked, since text could forge turns
    otherwise.

    Raises:
      UserError: the folder has no tokenizer, an invalid one, or one without `<|endoftext|>`; or
        it is a model folder whose tokenizer does not match its digest.
    """
    file = Path(folder) / "tokenizer.json"
    if (Path(folder) / "model.json").is_file():
        verify(Path(folder), [file.name])
    if not file.is_file():
        file = Path(folder) / "vocab.json"
    if not file.is_file():
        raise UserError(f"{folder!r}: expected tokenizer.json, or vocab.json with merges.txt")
    read = _read_tokenizer_json if file.name == "tokenizer.json" else _read_vocabulary
    backend = read(file)
    # `Tokenizer` encodes its control tokens, where an invalid model raises an error of the library.
    with library_errors(f"{file}: "):
        return _with_image(backend)


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    not_a_tokenizer = f"{file}: expected a file of the tokenizers library, got "
    with library_errors(not_a_tokenizer):
        fields = read_fields(file)
    if not isinstance(fields.get("model"), dict):
        raise UserError(f"{not_a_tokenizer}one without a model")
    check_components(file, fields)
    # Loads the checked fields, not the file, in which the library may see a second key of one name.
    names = ("version", "added_tokens", "model", *COMPONENTS)
    checked = {name: fields[name] for name in names if name in fields}
    with library_errors(not_a_tokenizer):
        backend = tokenizers.Tokenizer.from_str(json.dumps(checked))
    added = fields.get("added_tokens") or []
    check_ids(file, fields["model"].get("vocab"), added)
    check_loaded_ids(file, {token["content"]: token["id"] for token in added}, backend)
    return backend


def _read_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """Reads `vocab.json` and `merges.txt` with `transformers`, which knows their settings."""
    vocabulary = read_fields(file)
    check_merges(file.with_name("merges.txt"))
    config, listed, *_ = (
        read_fields(file.with_name(name)) if file.with_name(name).exists() else {}
        for name in SETTINGS
    )
    added = added_ids(file.with_name(SETTINGS[0]), config) | listed
    check_ids(file, vocabulary, [{"content": token, "id": i} for token, i in added.items()])
    # Takes seconds to import, and most folders do not need it.
    from transformers import AutoTokenizer  # noqa: PLC0415

    with (
        only_checked_files(file) as folder,
        library_errors(
            f"{file.parent}: expected vocab.json, merges.txt and tokenizer_config.json as Qwen "
            "publishes them, got an error of transformers: "
        ),
    ):
        # Never runs code that the folder contains, and does not ask.
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = loaded.backend_tokenizer
        fields = json.loads(backend.to_str())
    check_components(file.parent, fields)
    check_loaded_ids(file.parent, added, backend)
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a small tokenizer in Qwen's format; deterministic.

    `vocab_size` counts bytes, merges and Qwen's three control tokens, not `<image>`; texts with
    few distinct words give a smaller vocabulary.

    Raises:
      UserError: `vocab_size` is less than the 256 bytes and the control tokens.
    """
    controls = (END_OF_TEXT, IM_START, IM_END)
    smallest = 256 + len(controls)
    if vocab_size < smallest:
        raise invalid("vocab_size", vocab_size, f">= {smallest}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = _qwen_backend(models.BPE())
    backend.train_from_iterator(texts, trainer)
    return _with_image(_with_controls(backend, controls))


def _qwen_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """Wraps a BPE model in Qwen's normaliser, word splitting and byte alphabet."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_controls(backend: tokenizers.Tokenizer, names: Sequence[str]) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return backend


def _with_image(backend: tokenizers.Tokenizer) -> Tokenizer:
    used = set(backend.get_vocab().values())
    is_new = backend.token_to_id(IMAGE) is None
    present = [token for token in CONTROLS if backend.token_to_id(token) is not None]
    _with_controls(backend, [*present, IMAGE] if is_new else present)
    if is_new and (image_id := backend.token_to_id(IMAGE)) in used:
        raise UserError(
            f"tokenizer: expected a token {IMAGE!r} or ids without gaps, got neither: the next id, "
            f"{image_id}, is that of another token"
        )
    return Tokenizer(backend)


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))
