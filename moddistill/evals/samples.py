"""Rows of `samples/TASK.jsonl` from the samples that lmms-eval logs, and images for reports."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moddistill.evals.results import SAMPLES, write_jsonl

EXAMPLES = 24  # questions of a task that a report shows, at even distances
_SIDE = 256  # pixels of the longer side of a saved image
# What lmms-eval logs of a question next to the values of the metrics.
_LOGGED = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash",
    "input_media",
}  # fmt: skip


def write_samples(out: Path, results: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Writes the samples of each task, with the images of some, at even distances.

    Args:
      results: of lmms-eval.
      data: the data set of each task, by split.
    """
    folder = out / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results["samples"].items():
        config = results["configs"].get(task, {})
        docs = (data.get(task) or {}).get(config.get("test_split"))
        files = {
            number: _thumbnails(docs[samples[number]["doc_id"]], folder / "images" / task, number)
            for number in _shown(samples)
            if docs is not None
        }
        rows = [sample_row(each, files.get(i, [])) for i, each in enumerate(samples)]
        write_jsonl(folder / f"{task}.jsonl", rows)


def _shown(samples: Sequence[Mapping[str, Any]]) -> set[int]:
    """The numbers of samples whose images are saved: examples, and some that are not right."""
    wrong = [
        number
        for number, sample in enumerate(samples)
        if (score := score_of(_metrics(sample))) is not None and score < 1
    ]
    return {*evenly(range(len(samples)), EXAMPLES), *evenly(wrong, 2 * EXAMPLES)}


def evenly(items: Sequence[Any], count: int) -> Sequence[Any]:
    """Returns at most `count` items at even distances."""
    return items[:: max(1, len(items) // count)][:count]


def score_of(metrics: Mapping[str, Any]) -> float | None:
    """Returns the first score of a question among its metrics; None if there is none.

    A metric is a number, or an object that may have a `score`.
    """
    for value in metrics.values():
        value = value.get("score") if isinstance(value, Mapping) else value
        if isinstance(value, int | float):
            return float(value)
    return None


def _metrics(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name not in _LOGGED}


def _thumbnails(doc: Mapping[str, Any], folder: Path, number: int) -> list[str]:
    """Writes the images of a document small; returns their paths below `samples/`."""
    images = list(filter(None, map(_image, doc.values())))
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for place, image in enumerate(images):
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        file = folder / f"{number}-{place}.jpg"
        small.save(file, quality=85)
        names.append(str(file.relative_to(folder.parents[1])))
    return names


def _image(value: Any) -> Image.Image | None:
    """The image in a field of a document, decoded or as `datasets` stores it; None for others."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, Mapping) or not {"bytes", "path"} <= value.keys():
        return None
    source = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
    if not source:
        return None
    try:
        image = Image.open(source)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # a question that needs it has no answer
    return image


def sample_row(sample: Mapping[str, Any], images: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a row of `samples/TASK.jsonl` from a sample that lmms-eval logs.

    `id` (the number of the document), `question`, `images` (those that were saved), `answers`,
    `prediction`, and `metrics`: the values of the question for each metric, as the task gives them
    to its aggregation.
    """
    answers = sample["filtered_resps"]
    texts = [text for text in sample.get("arguments", ()) if isinstance(text, str)]
    return {
        "id": str(sample["doc_id"]),
        "question": texts[0] if texts else "",
        "images": list(images),
        "answers": list(_texts(sample.get("target"))),
        "prediction": answers[0] if len(answers) == 1 else list(answers),
        "metrics": json.loads(json.dumps(_metrics(sample), default=str)),
    }


def _texts(target: Any) -> Iterator[str]:
    """The right answers, of which a task may have one, several or none."""
    for each in target if isinstance(target, list | tuple) else [target]:
        if each is not None:
            yield str(each)
