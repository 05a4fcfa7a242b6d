"""MMHal-Bench (arXiv 2309.14525): 96 questions whose answers a judge rates from 0 to 6.

The judge is any endpoint that speaks OpenAI's chat completions (`_task_utils/judge.py`) and gets
the publisher's prompt, from `eval_gpt4.py` in the folder of the publisher's files. A rating below 3
is a hallucination. Without a judge, and without a verdict, answers are stored and counted.

    python -m moddistill.evals.tasks.mmhal_bench.utils OUTPUT_PATH

asks for the missing verdicts of the answers that lmms-eval stored, without the model, and brings
the scores of `moddistill.evaluate` in that folder up to date.
"""

import argparse
import ast
import functools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.judge import Judge, Verdict, verdicts_once
from moddistill.evals.tasks._task_utils.published_files import (
    check_images,
    dataset_of,
    find_folder,
    open_image,
    read_json,
)

TYPES = (
    "attribute", "adversarial", "comparison", "counting",
    "relation", "environment", "holistic", "other",
)  # fmt: skip
_FIELDS = (
    "question_type", "question_topic", "image_id", "image_src", "image_content", "question",
    "gt_answer",
)  # fmt: skip
_STORED = ("task", *_FIELDS, "model_answer")
_ANSWERS, _VERDICTS = "_answers.json", "mmhal_bench_verdicts.jsonl"
_SCORES = "scores.json"  # of `moddistill.evaluate`
_VARIABLE, _PROMPT_FILE = "MMHAL_BENCH_DIR", "eval_gpt4.py"
_HALLUCINATION = 3  # ratings below it
RATING = re.compile(r"rating\**:\**\s*([0-6])\b", re.IGNORECASE)  # also "**Rating:** 4"

Row = Mapping[str, Any]
Score = float | str  # "N/A" without a verdict


def read_documents(folder: Path, task: str = "mmhal_bench") -> list[dict[str, Any]]:
    """Returns the publisher's records, with their images and the name of the task.

    Raises:
      TaskError: an image is missing.
    """
    records = read_json(folder / "response_template.json")
    documents = []
    for record in records:
        name = record["image_src"].rpartition("/")[2]
        fields = {field: record[field] for field in _FIELDS}
        documents.append({"task": task, **fields, "image": str(folder / "images" / name)})
    check_images([Path(each["image"]) for each in documents])
    return documents


def process_docs(files: Any, task: str = "mmhal_bench") -> Any:
    """The publisher's records for the list of the publisher's files."""
    documents = read_documents(find_folder(files), task)
    if Judge.from_environment():  # what it lacks is reported before the model answers
        judge_prompt()
    return dataset_of(documents)


process_docs_llava_mod = functools.partial(process_docs, task="mmhal_bench_llava_mod")


def doc_to_visual(doc: Row) -> list[Any]:
    return [open_image(doc["image"], doc["question"])]


def doc_to_text(doc: Row, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    settings = lmms_eval_specific_kwargs
    return f"{settings['pre_prompt']}{doc['question']}{settings['post_prompt']}"


def process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """Returns the record with the answer, under every metric."""
    row = {field: doc[field] for field in ("task", *_FIELDS)} | {"model_answer": results[0]}
    names = ("score", "hallucination_rate", "answers", "missing_verdicts", "words")
    return {f"mmhal_{name}": row for name in (*names, *(f"score_{name}" for name in TYPES))}


def judge_prompt() -> str:
    """Returns the publisher's prompt, with a `{}` for each part.

    Raises:
      TaskError: there is none.
    """
    path = Path(os.environ.get(_VARIABLE, "")) / _PROMPT_FILE
    if path.is_file():
        for statement in ast.parse(path.read_text()).body:
            match statement:
                case ast.Assign(
                    targets=[ast.Name(id="template")], value=ast.Constant(value=str(text))
                ):
                    return text
    raise TaskError(
        f"${_VARIABLE}: a judge needs the prompt of {_PROMPT_FILE}, `template`, in {path.parent} "
        "(https://huggingface.co/datasets/Shengcao1006/MMHal-Bench)"
    )


def judged(rows: Sequence[Row], folder: Path) -> list[Verdict | None]:
    """Stores answers and returns their verdicts; the judge is asked for those it has not given.

    Without a judge, the verdicts are those stored with the same answers.
    """
    judge = Judge.from_environment()
    template = judge_prompt() if judge else ""
    path = folder / f"{rows[0]['task']}{_ANSWERS}"
    folder.mkdir(parents=True, exist_ok=True)
    found = _stored_verdicts(rows, path)
    _write(path, _reviewed(rows, found))
    if judge:
        prompts = tuple(_fill(template, row) for row in rows)
        found = verdicts_once(judge, prompts, RATING, folder / _VERDICTS)
        _write(path, _reviewed(rows, found))
    return found


def read_answers(path: Path) -> list[Row]:
    """Returns the stored rows, with `judge_review` and `rating` where there is a verdict.

    Raises:
      TaskError: the file has something else.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all(map(_is_answer, rows)):
        raise TaskError(f"{path}: expected rows with {', '.join(_STORED)}, got something else")
    return rows


def _is_answer(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and set(_STORED) <= row.keys()
        and isinstance(row["model_answer"], str)
        and row.get("rating", 0) in range(7)
    )


def _stored_verdicts(rows: Sequence[Row], path: Path) -> list[Verdict | None]:
    known = {
        _identity(row): Verdict(row.get("judge_review", ""), row["rating"])
        for row in (read_answers(path) if path.is_file() else ())
        if "rating" in row
    }
    return [known.get(_identity(row)) for row in rows]


def _identity(row: Row) -> str:
    return json.dumps([row[name] for name in _STORED])


def _reviewed(rows: Sequence[Row], found: Sequence[Verdict | None]) -> list[Row]:
    reviews = [each and {"judge_review": each.review, "rating": each.rating} for each in found]
    return [dict(row) | (review or {}) for row, review in zip(rows, reviews, strict=True)]


def _fill(template: str, row: Row) -> str:
    contents = ", ".join(row["image_content"])
    return template.format(contents, row["question"], row["gt_answer"], row["model_answer"])


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False))
    unfinished.replace(path)


def score(rows: Sequence[Row], args: Any, of: str = "") -> Score:
    """Returns the mean rating of the answers with a verdict, or of those of one type."""
    return _mean(
        [rating for row, rating in _ratings(rows, args) if of in ("", row["question_type"])]
    )


def hallucination_rate(rows: Sequence[Row], args: Any) -> Score:
    """Returns the share of the answers with a verdict that hallucinate, in percent."""
    return _mean([100 * (rating < _HALLUCINATION) for _, rating in _ratings(rows, args)])


def missing_verdicts(rows: Sequence[Row], args: Any) -> int:
    """Returns the number of answers without a verdict."""
    return len(rows) - len(_ratings(rows, args))


def answers(rows: Sequence[Row]) -> int:
    """Returns the number of answers that are not empty."""
    return sum(bool(row["model_answer"].strip()) for row in rows)


def words(rows: Sequence[Row]) -> float:
    """Returns the average length of an answer in words."""
    return sum(len(row["model_answer"].split()) for row in rows) / len(rows)


score_attribute, score_adversarial, score_comparison, score_counting = (
    functools.partial(score, of=name) for name in TYPES[:4]
)
score_relation, score_environment, score_holistic, score_other = (
    functools.partial(score, of=name) for name in TYPES[4:]
)


def _folder(args: Any) -> Path:
    return Path(getattr(args, "output_path", None) or ".") / "submissions"


def _ratings(rows: Sequence[Row], args: Any) -> list[tuple[Row, int]]:
    found = judged(rows, _folder(args))
    return [(row, each.rating) for row, each in zip(rows, found, strict=True) if each]


def _mean(values: Sequence[int]) -> Score:
    return sum(values) / len(values) if values else "N/A"


def _update_scores(task: str, args: Any, judged_scores: Mapping[str, Score]) -> None:
    """Replaces the scores of a task that an evaluation has finished."""
    path = Path(args.output_path) / _SCORES
    scores = read_json(path) if path.is_file() else {}
    if not isinstance(scores, dict) or not isinstance(scores.get(task, {}), dict):
        raise TaskError(f"{path}: expected scores by task, got something else")
    if task in scores:
        values = scores[task] | judged_scores
        scores[task] = {name: value for name, value in values.items() if value != "N/A"}
        _write(path, scores)


def main(argv: Sequence[str] | None = None) -> None:
    """Asks for missing verdicts, prints the scores, and replaces those in scores.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output_path", help=f"folder with submissions/mmhal_bench{_ANSWERS}")
    args = parser.parse_args(argv)
    paths = sorted(_folder(args).glob(f"mmhal_bench*{_ANSWERS}"))
    if not paths:
        parser.error(f"output_path: expected {_folder(args)}/mmhal_bench{_ANSWERS}")
    try:
        for path in paths:
            rows = [{name: row[name] for name in _STORED} for row in read_answers(path)]
            task = rows[0]["task"]
            measures = (score, hallucination_rate, missing_verdicts)
            found: dict[str, Score] = {f"mmhal_{f.__name__}": f(rows, args) for f in measures}
            for name, value in found.items():
                print(f"{task} {name}: {value}")
            found |= {f"mmhal_score_{name}": score(rows, args, of=name) for name in TYPES}
            _update_scores(task, args, found)
    except TaskError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
