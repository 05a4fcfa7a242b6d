"""A conversation in the terminal.

    python -m moddistill.chat --model DIR [--image FILE]

Answers appear as they are written. Besides questions, these lines are understood:

    /image FILE      adds an image to the next question; FILE as in --image
    /compare MODEL   has another model answer too, with its own earlier answers; without MODEL, ends
    /save FILE       writes the conversation as a LLaVA record
    /reset           begins a new conversation

An empty line or the end of input ends the conversation.
"""

import argparse
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from moddistill.cli.generation_flags import (
    add_generation_flags,
    check_images,
    decoding_of,
    load_model,
)
from moddistill.cli.parser import Parser, user_errors
from moddistill.data.images import load_image
from moddistill.errors import UserError, invalid, printable
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import stream
from moddistill.inference.loading import Loaded
from moddistill.inference.prompts import Prompt, with_images
from moddistill.storage.json_file import write_json

_COMMANDS = "/image FILE, /compare [MODEL], /save FILE, /reset"


@dataclasses.dataclass
class Conversation:
    """The images and turns of a conversation with one model."""

    loaded: Loaded
    name: str
    images: list[str]
    turns: list[tuple[str, str]]

    def ask(
        self, question: str, images: Sequence[str], decoding: Decoding
    ) -> Generator[str, None, str]:
        """Yields parts of the answer and returns it; `add` makes both a turn."""
        prompt = Prompt(question, (*self.images, *images), tuple(self.turns))
        text = ""
        for part in stream(*self.loaded, prompt, decoding):
            if isinstance(part, Answer):
                text = part.text
            else:
                yield part
        return text

    def add(self, question: str, images: Sequence[str], text: str) -> None:
        """Adds a turn with the images that are new in it."""
        self.images += images
        self.turns.append((question, text))


class Chat:
    """Conversations with one model, or with two that get the same questions.

    Args:
      load: loads the model of a name.
      images: of the first question.

    Raises:
      UserError: an image cannot be read, or the model.
    """

    def __init__(
        self,
        load: Callable[[str], Loaded],
        name: str,
        images: Sequence[str],
        decoding: Decoding,
    ):
        self._load, self._decoding = load, decoding
        self._new_images: list[str] = []
        for path in images:
            self._add_image(path)
        self._conversations = [Conversation(load(name), name, [], [])]

    def reply(self, line: str) -> Iterator[str]:
        """Yields the text that a line is answered with, in parts.

        A question is a turn of all conversations or, after an error, of none.

        Raises:
          UserError: a command that does not exist, or a file or a model that cannot be read or
            written.
        """
        if line.startswith("/"):
            try:
                said = self._command(*line[1:].partition(" ")[::2])
            except OSError as error:
                raise UserError(f"{line}: {error.strerror or error}") from error
            yield said
            return
        images, texts = self._new_images, []
        question = with_images(line, len(images))
        for conversation in self._conversations:
            if len(self._conversations) > 1:
                yield f"[{conversation.name}] "
            texts.append((yield from conversation.ask(question, images, self._decoding)))
            yield "\n"
        for conversation, text in zip(self._conversations, texts, strict=True):
            conversation.add(question, images, text)
        self._new_images = []

    def _command(self, name: str, argument: str) -> str:
        argument = argument.strip()
        match name:
            case "image" if argument:
                if not Path(argument).is_file():
                    raise invalid("/image", argument, "an image file")
                self._add_image(argument)
                return f"{len(self._new_images)} image(s) for the next question\n"
            case "compare":
                self._compare(argument)
                return ""
            case "save" if argument:
                write_json(Path(argument), self._record())
                return f"saved to {argument}\n"
            case "reset":
                self._new_images = []
                for conversation in self._conversations:
                    conversation.images, conversation.turns = [], []
                return "a new conversation\n"
        raise UserError(f"expected a question or one of {_COMMANDS}, got {'/' + name!r}")

    def _add_image(self, path: str) -> None:
        load_image(path)  # now, since an image that cannot be read would fail every later question
        self._new_images.append(path)

    def _compare(self, name: str) -> None:
        first = self._conversations[0]
        other = []
        if name:
            # It continues from the same turns.
            other = [Conversation(self._load(name), name, list(first.images), list(first.turns))]
        self._conversations = [first, *other]

    def _record(self) -> list[dict]:
        """The conversations as LLaVA records."""
        return [
            {
                "id": each.name,
                "image": list(each.images),
                "conversations": [
                    {"from": role, "value": text}
                    for turn in each.turns
                    for role, text in zip(("human", "gpt"), turn, strict=True)
                ],
            }
            for each in self._conversations
        ]


def _input_lines() -> Iterator[str]:
    """Yields lines from the terminal up to an empty one."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.chat`."""
    parser = Parser(__doc__, prog="python -m moddistill.chat")
    add_generation_flags(parser, max_new_tokens=256)
    args: argparse.Namespace = parser.parse_args(argv)
    check_images(parser, args)
    with user_errors():
        decoding = decoding_of(args)
        chat = Chat(lambda name: load_model(args, name), args.model, args.image, decoding)
        for line in _input_lines():
            try:
                for part in chat.reply(line):
                    print(printable(part), end="", flush=True)
            except UserError as error:  # what was said so far stays
                print(printable(f"error: {error}"))
            except KeyboardInterrupt:  # ends the answer; at the prompt, the conversation
                print()


if __name__ == "__main__":
    main()
