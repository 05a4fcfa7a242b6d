"""The texts of a vocabulary's tokens, as bytes: what tokens of different vocabularies share."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moddistill.data.chat_template import end_token
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.storage.json_file import read_json, write_json

END = b"\xff"  # in place of the text of an end token: no byte of UTF-8


@dataclasses.dataclass(frozen=True)
class TokenTexts:
    """The tokens of a vocabulary.

    Attributes:
      texts: of each id, UTF-8 that may begin and end within a character; None of an id that is no
        text.
      controls: ids of all other tokens, by their names.
      end: id of the token that ends an answer; None if a line break does.
    """

    texts: Sequence[bytes | None]
    controls: Mapping[str, int]
    end: int | None

    def spell(self, ids: np.ndarray) -> list[bytes]:
        """Returns the text of each id, `END` of end tokens; UserError for other control tokens."""
        return [self._spell(id) for id in ids.tolist()]

    def _spell(self, id: int) -> bytes:
        text = self.texts[id] if id < len(self.texts) else None
        if id == self.end:
            return END
        if text is None:
            raise UserError(f"supervised tokens: expected text and ends of answers, got id {id}")
        return text

    def save(self, file: Path) -> None:
        """Writes a JSON file, in which each character of a text is one byte."""
        texts = [text if text is None else text.decode("latin-1") for text in self.texts]
        write_json(file, {"end": self.end, "controls": dict(self.controls), "texts": texts})


def read_token_texts(file: Path) -> TokenTexts:
    """Reads what `save` wrote; UserError for another file."""
    fields = read_json(file)
    try:
        texts = [x if x is None else x.encode("latin-1") for x in fields["texts"]]
        return TokenTexts(texts, dict(fields["controls"]), fields["end"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: expected the texts of a vocabulary, got {error!r}") from None


def token_texts(backend: tokenizers.Tokenizer, end: str | None) -> TokenTexts:
    """Returns the tokens of a byte-level or a SentencePiece vocabulary.

    Args:
      end: name of the token that ends an answer; None if a line break does.

    Raises:
      UserError: the vocabulary is of another kind, or has no such end.
    """
    vocabulary = backend.get_vocab()
    added = backend.get_added_tokens_decoder().values()
    controls = {x.content: vocabulary[x.content] for x in added if x.special}
    if end is not None and end not in controls:
        raise UserError(f"tokenizer: expected a control token {end!r}, got none")
    texts: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    spell = _spelling(backend)
    written = {token.content for token in added}
    for token, id in vocabulary.items():
        if token not in controls:
            texts[id] = token.encode() if token in written else spell(token)
    return TokenTexts(texts, controls, None if end is None else controls[end])


def texts_in_template(tokenizer: Tokenizer, template: str) -> TokenTexts:
    """Returns the tokens of a tokenizer, with the end of an answer in a template."""
    end = end_token(template)
    return token_texts(tokenizer.backend, end if end in tokenizer.special_tokens else None)


def _spelling(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Returns the function from a token, as its vocabulary writes it, to its text."""
    parts = set(_types(json.loads(backend.decoder.__getstate__()))) if backend.decoder else set()
    if "ByteLevel" in parts:
        byte_of = {char: byte for byte, char in _byte_characters()}
        return lambda token: bytes(byte_of[char] for char in token)
    if parts & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_text
    raise UserError(
        "tokenizer: expected a decoder of byte-level or SentencePiece tokens, got "
        f"{' + '.join(sorted(parts)) or 'none'}"
    )


def _types(decoder: dict[str, Any]) -> Iterator[str]:
    """Yields the types of a decoder and of those that it consists of."""
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _types(part)


def _byte_characters() -> Iterator[tuple[int, str]]:
    """Yields each byte and the character in its place in byte-level vocabularies, as in GPT-2.

    Bytes that are visible in Latin-1 are themselves; the others are characters from 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    for byte in range(256):
        yield byte, chr(byte if byte in visible else 256 + hidden.index(byte))


def _sentencepiece_text(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()
