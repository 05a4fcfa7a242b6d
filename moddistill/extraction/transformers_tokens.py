"""Tokens of a conversation as a processor of `transformers` makes them, and its answers there."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from moddistill.data.token_texts import TokenTexts, token_texts
from moddistill.errors import UserError, invalid, one_line
from moddistill.extraction.chat_text import ChatText, Message, after_answer


class Places(NamedTuple):
    """Supervised tokens of a conversation: their ids, and their numbers without padding."""

    labels: np.ndarray
    positions: np.ndarray


class ChatTokens:
    """The tokenizer and the chat template of a processor.

    Raises:
      UserError: the processor has no chat template, no fast tokenizer, or no images.
    """

    def __init__(self, processor: Any, origin: str):
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._origin = origin
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{origin}: expected a processor with a chat template, got none")
        if not getattr(self._tokenizer, "is_fast", False):
            raise UserError(f"{origin}: expected a tokenizer with offsets (tokenizer.json)")
        image = getattr(processor, "image_token", None)
        if image is None:
            raise UserError(f"{origin}: expected a processor of images, got one without")
        self.image_id = int(self._tokenizer.convert_tokens_to_ids(image))

    def template(self, chat: list[Message]) -> str:
        """Returns messages as text; UserError if the template refuses them."""
        try:
            return self._processor.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise UserError(f"chat template: {one_line(str(error) or repr(error))}") from error

    def adds_special_tokens(self, text: str) -> bool:
        """Returns whether the tokenizer adds what begins a text, or the template has done so."""
        begin = self._tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """The vocabulary, with the token that the template has after an answer."""
        backend = self._tokenizer.backend_tokenizer
        names = {id: name for name, id in token_texts(backend, None).controls.items()}
        following = self._tokenizer(after_answer(self.template), add_special_tokens=False)
        end = names.get(next(iter(following["input_ids"]), None))
        if end is None:
            raise UserError(
                f"{self._origin}: expected a chat template with a control token after each answer"
            )
        return token_texts(backend, end)

    def places(self, chat: ChatText, ids: np.ndarray, images: int) -> Places:
        """Returns the supervised tokens of a conversation.

        Args:
          ids: that the model reads, in which placeholders of images are repeated.
          images: number of images.

        Raises:
          UserError: tokens are not those of the text, or an answer has none.
        """
        encoded = self._tokenizer(
            chat.text,
            return_offsets_mapping=True,
            add_special_tokens=self.adds_special_tokens(chat.text),
        )
        tokens, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"])
        count = tokens.count(self.image_id)
        if count != images:
            raise invalid("images in the chat template", count, f"{images}, as in the record")
        controls = {*self.texts.controls.values(), self.image_id}
        where = expanded_positions(tokens, ids.tolist(), self.image_id, controls)
        chosen = [self._tokens_of(answer, chat.text, tokens, offsets) for answer in chat.answers]
        positions = where[np.concatenate(chosen)]
        return Places(ids[positions].astype(np.int32), positions)

    def _tokens_of(
        self, answer: tuple[int, int], text: str, tokens: Sequence[int], offsets: np.ndarray
    ) -> np.ndarray:
        """Returns the numbers of the tokens of an answer, a space before it, and its end."""
        start, stop = answer
        start -= text[start - 1 : start] == " "  # which many tokenizers join to the first word
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        if not len(inside):
            raise UserError("answer: expected tokens, got none")
        if offsets[inside[0], 0] < start or offsets[inside[-1], 1] > stop:
            raise UserError("answer: expected tokens of its own, got one with the template's text")
        after = inside[-1] + 1
        if after < len(tokens) and tokens[after] == self.texts.end:
            return np.append(inside, after)
        return inside


def expanded_positions(
    tokens: Sequence[int], expanded: Sequence[int], image_id: int, controls: Collection[int]
) -> np.ndarray:
    """Returns, of each token, its position where each placeholder became a run of control tokens.

    Raises:
      UserError: an image has no such run, or other tokens differ.
    """
    positions, at = np.zeros(len(tokens), np.int64), 0
    for number, token in enumerate(tokens):
        positions[number] = at
        if token == image_id:
            following = tokens[number + 1] if number + 1 < len(tokens) else None
            if following == image_id:
                continue  # several images without text between them are one run
            first = at
            while at < len(expanded) and expanded[at] in controls and expanded[at] != following:
                at += 1
            if image_id not in expanded[first:at]:
                raise UserError("processor: expected tokens of each image, got none")
        elif at >= len(expanded) or expanded[at] != token:
            raise UserError("processor: expected the tokens of the text around images, got others")
        else:
            at += 1
    if at != len(expanded):
        raise UserError("processor: expected the tokens of the text, got more")
    return positions
