"""Prompts of LLaVA-MoD's evaluation (those of LLaVA-1.5) where lmms-eval has others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def mmbench_doc_to_text(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]
) -> str:
    """Returns hint, question, options up to the first empty one, and suffix, each on its line."""
    lines = [] if _is_empty(doc["hint"]) else [doc["hint"]]
    lines.append(doc["question"])
    for letter in "ABCD":
        if _is_empty(doc.get(letter)):
            break
        lines.append(f"{letter}. {doc[letter]}")
    return "\n".join(lines) + lmms_eval_specific_kwargs["post_prompt"]


def _is_empty(value: Any) -> bool:
    """Returns whether a cell of MMBench's table is empty."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value.strip().lower() in ("", "nan", "none")


def mmbench_accuracy(results: Sequence[Mapping[str, Any]]) -> float:
    """Returns the accuracy in percent; letters are read by rules, no judge is asked."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator  # noqa: PLC0415

    return 100 * mmbench_evaluator.eval_result(results, eval_method="static")[0]
