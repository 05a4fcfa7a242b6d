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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moddistill.cli.generation_flags import (
    Loaded,
    add_generation_flags,
    check_images,
    decoding_of,
    load_model,
)
from moddistill.cli.parser import Parser, user_errors
from moddistill.errors import UserError, invalid, printable
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import stream
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

    def ask(self, question: str, decoding: Decoding) -> Iterator[str]:
        """Yields parts of the answer, which then belongs to the conversation."""
        prompt = Prompt(question, tuple(self.images), tuple(self.turns))
        for part in stream(*self.loaded, prompt, decoding):
            if isinstance(part, Answer):
                self.turns.append((question, part.text))
            else:
                yield part


class Chat:
    """Conversations with one model, or with two that get the same questions.

    Args:
      load: loads the model of a name.
      images: of the first question.
    """

    def __init__(
        self,
        load: Callable[[str], Loaded],
        name: str,
        images: Sequence[str],
        decoding: Decoding,
    ):
        self._load, self._decoding = load, decoding
        self._new_images = list(images)
        self._conversations = [Conversation(load(name), name, [], [])]

    def reply(self, line: str) -> Iterator[str]:
        """Yields the text that a line is answered with, in parts.

        Raises:
          UserError: a command that does not exist, a file that cannot be read, or a model.
        """
        if line.startswith("/"):
            yield self._command(*line[1:].partition(" ")[::2])
            return
        question = with_images(line, len(self._new_images))
        for conversation in self._conversations:
            if len(self._conversations) > 1:
                yield f"[{conversation.name}] "
            before = len(conversation.images)
            conversation.images += self._new_images
            try:
                yield from conversation.ask(question, self._decoding)
            except UserError:
                del conversation.images[before:]
                raise
            yield "\n"
        self._new_images = []

    def _command(self, name: str, argument: str) -> str:
        argument = argument.strip()
        match name:
            case "image" if argument:
                if not Path(argument).is_file():
                    raise invalid("/image", argument, "an image file")
                self._new_images.append(argument)
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


if __name__ == "__main__":
    main()
