"""The tokenizer: byte-level BPE in Qwen's format, and `<image>`, which may have any id.

Text and control tokens are encoded by different methods, so that text can never turn into control.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from moddistill.data.conversation import END_OF_TEXT, IM_END, IM_START
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer_file import (
    PARTS,
    WORD,
    added_ids,
    check_ids,
    check_loaded_ids,
    check_merges,
    check_parts,
    in_words,
    read_fields,
)
from moddistill.errors import UserError
from moddistill.models.vocabulary import IdRanges, id_ranges
from moddistill.storage.digests import verify

# Those that templates and samples are made of.
CONTROLS = (END_OF_TEXT, IM_START, IM_END, IMAGE)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `image_id` marks an image, `pad_id` fills up (and is masked)."""

    backend: tokenizers.Tokenizer

    def __post_init__(self):
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        required = {END_OF_TEXT, IMAGE}
        for token in CONTROLS:
            exists = token in required or self.backend.token_to_id(token) is not None
            if exists and self.special(token) in self.encode(token):
                raise UserError(f"text {token!r} is read as a control token by this tokenizer")

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Control tokens written in it are encoded as the characters they are."""
        return list(_encode(self.backend, text))

    def special(self, token: str) -> int:
        """Id of a control token.

        Raises:
          UserError: the vocabulary has no such token.
        """
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no token {token!r}")
        return token_id

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out, or written as they are called."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def image_id(self) -> int:
        return self.special(IMAGE)

    @property
    def pad_id(self) -> int:
        return self.special(END_OF_TEXT)

    @functools.cached_property
    def real_ids(self) -> IdRanges:
        """Ids that a language model may produce: those of all tokens but `<image>`."""
        return id_ranges(set(self.backend.get_vocab().values()) - {self.image_id})

    @property
    def special_tokens(self) -> set[str]:
        """Control tokens; encoding text never produces them."""
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
            # Answers follow the prompt, so the padding of a batch goes before it.
            "padding_side": "left",
            # The default of releases before 5 has one more, which decoders refuse.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __reduce__(self):
        # The switch that keeps control tokens out of text does not survive pickling by itself.
        return _from_json, (self.backend.to_str(),)


# The fixed parts of a template are most of a short sample.
@functools.lru_cache(maxsize=4096)
def _encode(backend: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a local folder; `<image>` is appended when it has none.

    Control tokens that a release does not mark as special are marked here, since text could forge
    turns otherwise.

    Raises:
      UserError: the folder has no tokenizer, a broken one, or one without `<|endoftext|>`; or it
        is a model folder whose tokenizer is damaged.
    """
    file = Path(folder) / "tokenizer.json"
    if (Path(folder) / "model.json").is_file():
        verify(Path(folder), [file.name])
    if not file.is_file():
        file = Path(folder) / "vocab.json"
    if not file.is_file():
        raise UserError(f"{folder!r}: no tokenizer.json, and no vocab.json with merges.txt")
    backend = (_read if file.name == "tokenizer.json" else _read_vocabulary)(file)
    # A model that cannot encode raises the library's own kind of error.
    with in_words(f"{file}: "):
        return _with_image(backend)


def _read(file: Path) -> tokenizers.Tokenizer:
    no_tokenizer = f"{file} is no tokenizer: "
    accepted = "; accepted: what the tokenizers library writes"
    with in_words(no_tokenizer, accepted):
        fields = read_fields(file)
    if not isinstance(fields.get("model"), dict):
        raise UserError(f"{no_tokenizer}it has no model{accepted}")
    check_parts(file, fields)
    # What was checked, and not the file, in which a name may occur twice.
    names = ("version", "added_tokens", "model", *PARTS)
    kept = {name: fields[name] for name in names if name in fields}
    with in_words(no_tokenizer, accepted):
        backend = tokenizers.Tokenizer.from_str(json.dumps(kept))
    added = fields.get("added_tokens") or []
    check_ids(file, fields["model"].get("vocab"), added)
    check_loaded_ids(file, {token["content"]: token["id"] for token in added}, backend)
    return backend


def _read_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`, as `transformers` reads them."""
    vocabulary = read_fields(file)
    check_merges(file.with_name("merges.txt"))
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    config, _, listed = (
        read_fields(file.with_name(name)) if file.with_name(name).exists() else {} for name in names
    )
    added = added_ids(file.with_name(names[0]), config) | listed
    check_ids(file, vocabulary, [{"content": token, "id": i} for token, i in added.items()])
    # Seconds to import, and most folders do not need it.
    from transformers import AutoTokenizer  # noqa: PLC0415

    # It raises errors of many kinds for settings that it does not understand.
    with in_words(
        f"{file.parent} holds no tokenizer that transformers reads: ",
        "; accepted: vocab.json, merges.txt and tokenizer_config.json as Qwen publishes them",
    ):
        # The code that a folder may bring is never run, nor asked about.
        loaded = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False)
        backend = loaded.backend_tokenizer
        fields = json.loads(backend.to_str())
    check_parts(file.parent, fields)
    check_loaded_ids(file.parent, added, backend)
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A small tokenizer in Qwen's format; the same texts give the same ids.

    `vocab_size` counts bytes, merges and the three control tokens of Qwen, not `<image>`; texts
    with too few different words give fewer.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and the control tokens.
    """
    controls = (END_OF_TEXT, IM_START, IM_END)
    smallest = 256 + len(controls)
    if vocab_size < smallest:
        raise UserError(f"vocab_size is {vocab_size}; it must be at least {smallest}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = _qwen_backend(models.BPE())
    backend.train_from_iterator(texts, trainer)
    return _with_image(_with_controls(backend, controls))


def _qwen_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """Qwen's normaliser, word splitting and byte alphabet around a BPE model."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
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
            f"the tokenizer has no token {IMAGE!r}, and its next id, {image_id}, is taken; "
            "accepted: ids without gaps, or a tokenizer with the token"
        )
    return Tokenizer(backend)


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))
