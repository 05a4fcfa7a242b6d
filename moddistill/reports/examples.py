"""Questions with the answers of all models next to each other, for choice by outcome."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moddistill.evals.samples import EXAMPLES, evenly
from moddistill.evals.task import Row
from moddistill.reports.template import Html, anchor, join, part
from moddistill.reports.workdirs import Results

MAX_IMAGE_SIZE = 256  # pixels of the longer side
_LARGEST_PNG = 32 * 1024  # bytes; larger images, such as photographs, are JPEG
_CHOICES = (
    ("all", "all"),
    ("differ", "models differ"),
    ("wrong", "a model is wrong"),
    ("right", "all are right"),
)


def answers(task: Sequence[Results], problems: list[str]) -> Html:
    """Returns examples of one task, of questions that all models answered.

    They are questions at even distances, and others of those on which scores differ. Images that
    cannot be read are added to `problems`.
    """
    rows = _shared(task)
    differing = [row for row in rows if len({score for _, score in row["answered"].values()}) > 1]
    # Results of lmms-eval have the images of some questions, among them many that are not right.
    differing = [row for row in differing if row["images"]] or differing
    chosen = {row["id"]: row for kind in (rows, differing) for row in evenly(kind, EXAMPLES)}
    missing: list[str] = []
    examples = [_example(chosen[row["id"]], missing) for row in rows if row["id"] in chosen]
    if missing:
        problems.append(
            f"{task[0].task}: {len(missing)} images of examples cannot be read, as {missing[0]}"
        )
    group = anchor(f"show {task[0].task}")
    choices = join(
        part(
            "choice",
            group=group,
            kind=kind,
            text=text,
            checked=Html(" checked") if kind == "all" else "",
        )
        for kind, text in _CHOICES
    )
    return part("answers", choices=choices, examples=join(examples))


def _shared(task: Sequence[Results]) -> list[dict[str, Any]]:
    """Rows with `answered`, the prediction and the score of each model."""
    by_model = {each.model: {str(row["id"]): row for row in each.rows} for each in task}
    first = next(iter(by_model.values()))
    shared = [name for name in first if all(name in rows for rows in by_model.values())]
    return [
        {
            "id": name,
            "row": first[name],
            "images": _images(task, name, by_model),
            "answered": {
                each.model: (by_model[each.model][name], each.score(by_model[each.model][name]))
                for each in task
            },
        }
        for name in shared
    ]


def _images(
    task: Sequence[Results], name: str, by_model: Mapping[str, Mapping[str, Row]]
) -> list[Path]:
    """The images of a question, from the first model whose results have them."""
    found = (
        [each.images / file for file in by_model[each.model][name].get("images", ())]
        for each in task
    )
    return next(filter(None, found), [])


def _example(example: Mapping[str, Any], missing: list[str]) -> Html:
    row: Row = example["row"]
    scores = [score for _, score in example["answered"].values()]
    wrong = any(score is not None and score < 1 for score in scores)
    differ = len(set(scores)) > 1
    return part(
        "example",
        marks=" ".join(["differ"] * differ + ["some-wrong"] * wrong),
        images=join(_image(path, missing) for path in example["images"]),
        question=row.get("question", row["id"]),
        answers=" / ".join(dict.fromkeys(row.get("answers", ()))),
        predictions=join(
            _prediction(model, text["prediction"], score)
            for model, (text, score) in example["answered"].items()
        ),
    )


def _prediction(model: str, text: Any, score: float | None) -> Html:
    kinds = {None: ("·", "unscored"), 1.0: ("✓", "right"), 0.0: ("✗", "wrong")}
    mark, kind = kinds.get(score, (f"{score or 0:.2f}", "partly"))
    return part("prediction", model=model, kind=kind, mark=mark, text=text)


def _image(path: Path, missing: list[str]) -> Html:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    # A broken chunk of a PNG is a SyntaxError, and a name with a null byte a ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        missing.append(str(path))
        return Html("")
    image.thumbnail((MAX_IMAGE_SIZE, MAX_IMAGE_SIZE))
    stream, format_ = io.BytesIO(), "png"
    image.save(stream, "PNG")
    if stream.tell() > _LARGEST_PNG:
        stream, format_ = io.BytesIO(), "jpeg"
        image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    kind = "photo" if format_ == "jpeg" else "drawing"
    return part("image", kind=kind, format=format_, data=data)
