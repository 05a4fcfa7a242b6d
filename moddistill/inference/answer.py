"""An answer while it is written: its tokens, when it ends, and the text that is settled."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from moddistill.data.chat_template import end_token
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import invalid
from moddistill.inference.sampling import Sampling

_INCOMPLETE = "\ufffd"  # in place of bytes that are no character yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are made.

    Attributes:
      max_new_tokens: of the longest answer.
      stop: texts before which an answer ends, besides the end token of the template.
      top_logprobs: number of the most probable tokens that are reported for each token.
      seed: of sampling. An answer depends on it and on the number of its prompt, not on the others.
    """

    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise invalid("max_new_tokens", self.max_new_tokens, ">= 1")
        if not all(self.stop):
            raise invalid("stop", self.stop, "texts that are not empty")
        if not 0 <= self.top_logprobs <= 1000:
            raise invalid("top_logprobs", self.top_logprobs, ">= 0 and <= 1000")


class TokenLogprobs(NamedTuple):
    """The log-probability of a token, and the most probable tokens in its place.

    Both are those of the model, before any setting of `Sampling`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
      text: without space around it, and without what ended it.
      token_ids: without the end token; a stop text may be in them.
      ended: `end` by the end token, `stop` by a stop text, or `length`.
      logprobs: of each token, and of the end token.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    ended: str
    logprobs: list[TokenLogprobs]


class Writing:
    """An answer that is being written.

    Attributes:
      number: of its prompt.
      max_new_tokens: those that its context leaves, at most those of `decoding`.
      dispatched: tokens that are computed or will be.
      ended: empty until the answer is finished.
    """

    def __init__(
        self, number: int, prompt_ids: Sequence[int], decoding: Decoding, context: int = 0
    ):
        self.number, self.prompt_ids, self.decoding = number, list(prompt_ids), decoding
        self.max_new_tokens = decoding.max_new_tokens
        if context:
            self.max_new_tokens = min(self.max_new_tokens, context - len(self.prompt_ids))
        self.dispatched = 0
        self.ended = ""
        self.text = ""
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, token: TokenLogprobs, end_id: int, tokenizer: Tokenizer) -> None:
        """Adds the next token, and decides whether it ends the answer."""
        self._logprobs.append(token)
        if token.token_id == end_id:
            self.ended = "end"
            return
        self._ids.append(token.token_id)
        if self.decoding.stop:
            text = tokenizer.decode(self._ids)
            found = [at for stop in self.decoding.stop if (at := text.find(stop)) >= 0]
            if found:
                self.ended, self.text = "stop", text[: min(found)]
                return
        if len(self._ids) == self.max_new_tokens:
            self.ended = "length"

    def settled(self, tokenizer: Tokenizer) -> str:
        """The text so far, of which no later token changes anything; all of it at the end."""
        if self.ended == "stop":
            return self.text.strip()
        text = tokenizer.decode(self._ids)
        if self.ended:
            return text.strip()
        text = text.rstrip(_INCOMPLETE)
        for stop in self.decoding.stop:
            # The longest end of the text that a stop text may begin with.
            sizes = range(min(len(stop) - 1, len(text)), 0, -1)
            held = next((size for size in sizes if text.endswith(stop[:size])), 0)
            text = text[: len(text) - held]
        return text.strip()

    def answer(self, tokenizer: Tokenizer) -> Answer:
        """The finished answer."""
        text = self.settled(tokenizer)
        return Answer(text, self._ids, self.prompt_ids, self.ended, self._logprobs)


def end_id(template: str, tokenizer: Tokenizer) -> int:
    """The id of the template's end token, or of a line break for a template without one."""
    end = end_token(template)
    return tokenizer.encode(end)[-1] if end.isspace() else tokenizer.special(end)
