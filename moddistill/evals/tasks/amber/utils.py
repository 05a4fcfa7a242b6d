"""AMBER (arXiv 2311.07397): hallucination in descriptions and in answers to yes/no questions.

Descriptions are scored by CHAIR (share of the mentioned objects that are not in the image), Cover
(share of the annotated objects that are mentioned), Hal (share of descriptions with a hallucinated
object) and Cog (share of the objects that people would imagine there, which are mentioned).
Questions are scored by accuracy, and by precision, recall and F1 of the answer "no". The AMBER
score is the mean of 100 - CHAIR and F1. All are percentages.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moddistill.evals.tasks._task_utils import nouns as words
from moddistill.evals.tasks._task_utils.published_files import (
    check_images,
    dataset_of,
    find_folder,
    open_image,
    read_json,
)

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}
_DESCRIPTIONS = tuple(f"amber_{name}" for name in ("chair", "cover", "hal", "cog"))
_THRESHOLD = 0.8  # of the cosine of near-synonyms
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)

Row = Mapping[str, Any]
Score = float | str  # "N/A" where there is nothing to count


class WordLists(NamedTuple):
    """The publisher's lists.

    Attributes:
      association: words that mean an object or a part of it, by object; `relation.json`.
      safe: words that are never hallucinated; `safe_words.txt`.
      objects: every word of `association`: other nouns are not counted.
    """

    association: Mapping[str, Sequence[str]]
    safe: frozenset[str]
    objects: frozenset[str]


def read_word_lists(folder: Path) -> WordLists:
    """Returns the word lists in the folder of the publisher's files."""
    association = read_json(folder / "data/relation.json")
    safe = frozenset((folder / "data/safe_words.txt").read_text().splitlines())
    return WordLists(association, safe, frozenset(association).union(*association.values()))


def read_documents(folder: Path) -> list[dict[str, Any]]:
    """Returns queries with their annotations.

    `truth` is a list of objects, or `["yes"]` or `["no"]`.

    Raises:
      TaskError: an image is missing.
    """
    annotations = read_json(folder / "data/annotations.json")
    by_id = {each["id"]: each for each in annotations}
    documents = []
    for query in read_json(folder / "data/query/query_all.json"):
        known = by_id[query["id"]]
        truth = known["truth"]
        documents.append(
            {
                "id": query["id"],
                "type": known["type"],
                "question": query["query"],
                "image": str(folder / "image" / query["image"]),
                "truth": [truth] if isinstance(truth, str) else truth,
                "hallu": known.get("hallu") or [],
            }
        )
    check_images([Path(each["image"]) for each in documents])
    return documents


def all_docs(files: Any, wanted: Callable[[Row], bool] = lambda doc: True) -> Any:
    """`process_docs`: the publisher's documents for the list of the publisher's files."""
    documents = [doc for doc in read_documents(find_folder(files)) if wanted(doc)]
    if any(map(is_generative, documents)):
        words.load_nltk()
        _scorer()
    return dataset_of(documents)


def generative_docs(files: Any) -> Any:
    """`process_docs`: images to describe."""
    return all_docs(files, is_generative)


def discriminative_docs(files: Any) -> Any:
    """`process_docs`: yes/no questions."""
    return all_docs(files, lambda doc: not is_generative(doc))


def is_generative(doc: Row) -> bool:
    return doc["type"] == "generative"


def doc_to_visual(doc: Row) -> list[Any]:
    return [open_image(doc["image"], doc["id"])]


def doc_to_text(doc: Row, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """Returns the publisher's query; `post_prompt` is for questions only."""
    suffix = "" if is_generative(doc) else lmms_eval_specific_kwargs["post_prompt"]
    return f"{lmms_eval_specific_kwargs['pre_prompt']}{doc['question']}{suffix}"


def doc_to_target(doc: Row) -> str:
    return ", ".join(doc["truth"])


def process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """Returns the counts of an answer, under the metrics that use them."""
    if is_generative(doc):
        lists, similar = _scorer()
        row = describe(words.nouns(results[0]), doc["truth"], doc["hallu"], lists, similar)
        return dict.fromkeys((*_DESCRIPTIONS, "amber_score"), row)
    row = {
        "dimension": DIMENSIONS[doc["type"]],
        "truth": doc["truth"][0],
        "answer": yes_or_no(results[0]),
    }
    rates = ("accuracy", "precision", "recall", "f1")
    names = [f"amber_{rate}{of}" for of in ("", f"_{row['dimension']}") for rate in rates]
    return dict.fromkeys((*names, "amber_unclear", "amber_score"), row)


def yes_or_no(answer: str) -> str | None:
    """Returns the first of the words yes and no in an answer, in lower case, or None."""
    found = _YES_OR_NO.search(answer)
    return found and found[0].lower()


def describe(
    mentioned: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    lists: WordLists,
    similar: Callable[[str, str], bool],
) -> dict[str, int]:
    """Returns the counts of one description.

    A mentioned object is covered if it equals an annotated one or a word associated with it, else
    if it is similar to one; else it is hallucinated.

    Args:
      mentioned: nouns of the description, in the singular.
      truth: objects in the image.
      hallu: objects that people would imagine there.
      similar: whether two words are near-synonyms.
    """
    there, imaginable = _expand(truth, lists), _expand(hallu, lists)
    objects = [noun for noun in mentioned if noun in lists.objects]
    covered: set[int] = set()
    imagined: set[int] = set()
    hallucinated = 0
    for noun in objects:
        if noun in lists.safe:
            continue
        if equal := _first(there, lambda word, noun=noun: word == noun):
            covered |= equal
            continue
        # An equal word and the first similar one both count.
        imagined |= _first(imaginable, lambda word, noun=noun: word == noun)
        imagined |= _first(imaginable, lambda word, noun=noun: similar(noun, word))
        near = _first(there, lambda word, noun=noun: similar(noun, word))
        covered |= near
        hallucinated += not near
    return {
        "objects": len(objects),
        "hallucinated": hallucinated,
        "truth": len(truth),
        "covered": len(covered),
        "hallu": len(hallu),
        "imagined": len(imagined),
    }


def _expand(objects: Sequence[str], lists: WordLists) -> list[tuple[str, int]]:
    """Pairs of a word and the number of its object: first associated words, then the objects."""
    associated = [
        (word, number)
        for number, name in enumerate(objects)
        for word in lists.association.get(name, ())
    ]
    return associated + [(name, number) for number, name in enumerate(objects)]


def _first(pairs: Sequence[tuple[str, int]], matches: Callable[[str], bool]) -> set[int]:
    return next(({number} for word, number in pairs if matches(word)), set())


@functools.cache
def _scorer() -> tuple[WordLists, Callable[[str, str], bool]]:
    model = os.environ.get("AMBER_SPACY_MODEL", "en_core_web_lg")
    lists = read_word_lists(Path(os.environ["AMBER_DIR"]))
    return lists, words.Vectors(model, _THRESHOLD).similar


def _percent(part: int, whole: int) -> Score:
    return 100 * part / whole if whole else "N/A"


def _share(rows: Sequence[Row], part: str, whole: str) -> Score:
    return _percent(sum(row[part] for row in rows), sum(row[whole] for row in rows))


def chair(rows: Sequence[Row]) -> Score:
    return _share(rows, "hallucinated", "objects")


def cover(rows: Sequence[Row]) -> Score:
    return _share(rows, "covered", "truth")


def hal(rows: Sequence[Row]) -> Score:
    return _percent(sum(row["hallucinated"] > 0 for row in rows), len(rows))


def cog(rows: Sequence[Row]) -> Score:
    return _share(rows, "imagined", "hallu")


def accuracy(rows: Sequence[Row]) -> Score:
    return _percent(sum(row["answer"] == row["truth"] for row in rows), len(rows))


def precision(rows: Sequence[Row]) -> Score:
    denied = [row for row in rows if row["answer"] == "no"]
    return _percent(sum(row["truth"] == "no" for row in denied), len(denied))


def recall(rows: Sequence[Row]) -> Score:
    absent = [row for row in rows if row["truth"] == "no"]
    return _percent(sum(row["answer"] == "no" for row in absent), len(absent))


def f1(rows: Sequence[Row]) -> Score:
    denied_or_absent = sum((row["answer"] == "no") + (row["truth"] == "no") for row in rows)
    both = sum(row["answer"] == row["truth"] == "no" for row in rows)
    return _percent(2 * both, denied_or_absent)


def unclear(rows: Sequence[Row]) -> Score:
    """Returns the share of answers with neither yes nor no, which count as wrong."""
    return _percent(sum(row["answer"] is None for row in rows), len(rows))


# lmms-eval would bootstrap a function with "amber_" in its name, 100,000 times.
def overall(rows: Sequence[Row]) -> Score:
    """Returns the AMBER score."""
    descriptions = [row for row in rows if "objects" in row]
    answers = [row for row in rows if "answer" in row]
    parts = chair(descriptions), f1(answers)
    if "N/A" in parts:
        return "N/A"
    return (100 - parts[0] + parts[1]) / 2


# `process_results` gives each of these the rows of its dimension.
accuracy_existence = accuracy_attribute = accuracy_relation = accuracy
precision_existence = precision_attribute = precision_relation = precision
recall_existence = recall_attribute = recall_relation = recall
f1_existence = f1_attribute = f1_relation = f1
