"""Conversations of English text in LLaVA's lengths, for benchmarks of data.

Words are those of the docstrings of Python's standard library, in their order. One in 50 is put
together of two, since in natural text too, words that did not occur before never end. The number of
text tokens of a record is log-normal with median 90 and 95th percentile 500, of Qwen's tokenizer,
and there is one turn for each 100 of them.
"""

import ast
import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from tests.data import qwen_ranks

_DEVIATION = np.log(500 / 90) / 1.645  # 1.645 deviations above the median: 95th percentile
_LONGEST = 4000  # tokens
_TURN = 100  # tokens
_RARE = 1 / 50  # of all words
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


@functools.cache
def docstring_words() -> list[str]:
    """Returns the words of the docstrings of the standard library, about 130,000."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    trees = [ast.parse(file.read_bytes()) for file in files]
    nodes = (n for tree in trees for n in ast.walk(tree) if isinstance(n, _DOCUMENTED))
    return [word for node in nodes for word in (ast.get_docstring(node) or "").split()]


def qwen_tokenizer(folder: Path) -> Tokenizer:
    """Writes Qwen's tokenizer to a folder, unless it is there, and loads it."""
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        qwen_ranks.write_tokenizer_json(folder)
    return load_tokenizer(str(folder))


class Conversations:
    """Random conversations, in the fields of LLaVA's `conversations`."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0):
        self._words = docstring_words()
        self._rng = np.random.default_rng(seed)
        sample = self._consecutive_words(100_000)
        self._tokens_per_word = len(tokenizer.encode(" ".join(sample))) / len(sample)

    def make(self) -> list[dict[str, Any]]:
        """Returns the messages of a conversation about one image."""
        tokens = min(self._rng.lognormal(np.log(90), _DEVIATION), _LONGEST)
        words = self._consecutive_words(max(4, round(tokens / self._tokens_per_word)))
        turns = 1 + int(tokens / _TURN)
        ends = [len(words) * (turn + 1) // turns for turn in range(turns)]
        messages, start = [], 0
        for end in ends:
            middle = start + max(1, (end - start) // 4)
            question = "<image>\n" * (not messages) + " ".join(words[start:middle])
            messages.append({"from": "human", "value": question})
            messages.append({"from": "gpt", "value": " ".join(words[middle:end])})
            start = end
        return messages

    def _consecutive_words(self, count: int) -> list[str]:
        start = self._rng.integers(len(self._words) - count)
        words = self._words[start : start + count]
        for at in np.flatnonzero(self._rng.random(count) < _RARE).tolist():
            words[at] += self._words[self._rng.integers(len(self._words))]
        return words
