"""Greedy answers that were made before, in a file that grows as they are made.

lmms-eval keeps the answers of a task when it has all of them. An evaluation that is interrupted
between two answers goes on from this file.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from moddistill.evals.results import read_rows
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.prompts import Prompt
from moddistill.storage.text_file import append_lines


class Given(NamedTuple):
    """What is kept of an answer: its text, and the tokens of prompt and answer."""

    text: str
    prompt_tokens: int
    tokens: int


def given_of(answer: Answer) -> Given:
    """Returns what is kept of an answer."""
    return Given(answer.text, len(answer.prompt_ids), len(answer.token_ids))


class AnswerLog:
    """Answers of one model by their keys.

    Args:
      file: JSON lines; those of other models stay there, and one that an interruption has cut is
        not read. Without a file nothing is kept.
      model: the digest of its files, and how it is computed.
    """

    def __init__(self, file: Path | None, model: str):
        self._file, self._model = file, model
        rows = read_rows(file)[0] if file else []
        self._found = {row["key"]: Given(*row["answer"]) for row in rows if "key" in row}

    def key(self, place: Any, prompt: Prompt, decoding: Decoding) -> str:
        """Returns the key of an answer.

        Args:
          place: the task and the number of the document, which say what the images are.
        """
        asked = prompt.question, prompt.history, prompt.system, len(prompt.images)
        text = json.dumps([self._model, place, asked, dataclasses.asdict(decoding)])
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Given | None:
        """Returns the answer of a key, if it was made before."""
        return self._found.get(key)

    def add(self, key: str, answer: Given) -> None:
        """Appends an answer.

        Raises:
          UserError: the disk is full.
        """
        self._found[key] = answer
        if self._file is not None:
            append_lines(self._file, (json.dumps({"key": key, "answer": answer}) + "\n").encode())
