"""Object HalBench as RLHF-V publishes it: CHAIR over the 80 COCO classes, without a judge.

An object is mentioned where a word or pair of words of the answer, in the singular, is a COCO class
or one of its synonyms. It is hallucinated if it is neither segmented in the image nor mentioned in
one of the five captions of COCO. The paper's two rates are of answers that mention an object, and
of mentioned objects; both are percentages.

References: arXiv 2312.00849 (RLHF-V), arXiv 1809.02156 (CHAIR).
"""

import base64
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.nouns import load_nltk, singular_words
from moddistill.evals.tasks._task_utils.published_files import (
    dataset_of,
    find_folder,
    open_image,
    read_json,
)

# Pairs of words that are no synonym of a class, or not the class of their second word.
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
_PAIRS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "home plate": "home plate",
    "train track": "train track",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}

Row = Mapping[str, Any]
Score = float | str  # "N/A" where there is nothing to count


class Vocabulary(NamedTuple):
    """Words of the COCO classes: the class of each synonym, and the pairs read as one word."""

    classes: Mapping[str, str]
    pairs: Mapping[str, str]


def read_vocabulary(synonyms: Path) -> Vocabulary:
    """Returns the vocabulary of a file with a class and its synonyms in each line."""
    classes = {}
    for line in synonyms.read_text().splitlines():
        name, *others = (word.strip() for word in line.split(","))
        classes |= dict.fromkeys([name, *others], name)
    pairs = {word: word for word in classes if " " in word}
    return Vocabulary(classes, pairs | _PAIRS)


def mentions(words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Returns the COCO class of every mention, in order, of words in the singular."""
    merged = []
    words = list(words)
    while words:
        pair = vocabulary.pairs.get(" ".join(words[:2]))
        merged.append(pair or words[0])
        del words[: 2 if pair else 1]
    if "toilet" in merged:  # the seat of a toilet is no chair
        merged = [word for word in merged if word != "seat"]
    return [vocabulary.classes[word] for word in merged if word in vocabulary.classes]


def read_documents(
    folder: Path, words_of: Callable[[str], list[str]] = singular_words
) -> list[dict[str, Any]]:
    """Returns questions with the COCO classes in their images.

    Raises:
      TaskError: no file of annotations has one of the images.
    """
    vocabulary = read_vocabulary(folder / "synonyms_refine.txt")
    questions = read_json(folder / "obj_halbench_300_with_image.jsonl")
    objects: dict[int, set[str]] = {int(each["image_id"]): set() for each in questions}
    known: set[int] = set()
    for split in ("train", "val"):  # one file at a time: they are hundreds of megabytes
        for image, name in _segmented(folder / f"annotations/instances_{split}2014.json"):
            if image in objects:
                objects[image].add(vocabulary.classes[name])
        for image, caption in _captions(folder / f"annotations/captions_{split}2014.json"):
            if image in objects:
                known.add(image)
                objects[image].update(mentions(words_of(caption), vocabulary))
    if unknown := objects.keys() - known:
        raise TaskError(f"{folder}/annotations: no captions of image {min(unknown)}")
    return [
        {
            "number": number,
            "image_id": int(each["image_id"]),
            "question": each["question"],
            "image": base64.b64decode(each["image"]),
            "objects": sorted(objects[int(each["image_id"])]),
        }
        for number, each in enumerate(questions)
    ]


def _segmented(path: Path) -> Iterable[tuple[int, str]]:
    """Yields (number of an image, name of the class) for every segmentation."""
    content = read_json(path)
    names = {each["id"]: each["name"] for each in content["categories"]}
    for each in content["annotations"]:
        yield each["image_id"], names[each["category_id"]]


def _captions(path: Path) -> Iterable[tuple[int, str]]:
    for each in read_json(path)["annotations"]:
        yield each["image_id"], each["caption"]


def process_docs(files: Any) -> Any:
    """The publisher's questions for the list of the publisher's files."""
    load_nltk()
    return dataset_of(read_documents(find_folder(files)))


def doc_to_visual(doc: Row) -> list[Any]:
    return [open_image(doc["image"], doc["number"])]


def doc_to_text(doc: Row) -> str:
    return doc["question"]


def doc_to_target(doc: Row) -> str:
    return ", ".join(doc["objects"])


def process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """Returns the counts of an answer, under every metric."""
    row = count(results[0], mentions(singular_words(results[0]), _vocabulary()), doc["objects"])
    names = ("response", "mention", "all_responses", "recall", "with_objects", "words")
    return {f"object_halbench_{name}": row for name in names}


def count(answer: str, mentioned: Sequence[str], objects: Iterable[str]) -> dict[str, int]:
    """Returns the counts of one answer.

    Args:
      mentioned: the COCO class of every mention.
      objects: COCO classes in the image.
    """
    there = set(objects)
    return {
        "mentions": len(mentioned),
        "hallucinated": sum(name not in there for name in mentioned),
        "objects": len(there),
        "found": len(there.intersection(mentioned)),
        "words": len(answer.split()),
    }


@functools.cache
def _vocabulary() -> Vocabulary:
    return read_vocabulary(Path(os.environ["OBJECT_HALBENCH_DIR"]) / "synonyms_refine.txt")


def _percent(part: int, whole: int) -> Score:
    return 100 * part / whole if whole else "N/A"


def response_rate(rows: Sequence[Row]) -> Score:
    """Returns the share of hallucinating answers among those that mention an object."""
    return _percent(
        sum(row["hallucinated"] > 0 for row in rows), sum(row["mentions"] > 0 for row in rows)
    )


def mention_rate(rows: Sequence[Row]) -> Score:
    """Returns the share of hallucinated objects among the mentioned ones."""
    return _percent(sum(row["hallucinated"] for row in rows), sum(row["mentions"] for row in rows))


def all_responses_rate(rows: Sequence[Row]) -> Score:
    """Returns the share of hallucinating answers among all."""
    return _percent(sum(row["hallucinated"] > 0 for row in rows), len(rows))


def recall(rows: Sequence[Row]) -> Score:
    """Returns the share of the objects in the images that are mentioned."""
    return _percent(sum(row["found"] for row in rows), sum(row["objects"] for row in rows))


def with_objects(rows: Sequence[Row]) -> int:
    """Returns the number of answers that mention an object."""
    return sum(row["mentions"] > 0 for row in rows)


def average_words(rows: Sequence[Row]) -> float:
    """Returns the average length of an answer in words."""
    return sum(row["words"] for row in rows) / len(rows)
