"""The files of a benchmark that its publisher has people download themselves."""

import io
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moddistill.evals.tasks._task_utils.errors import TaskError

_SHOWN = 3  # missing images that a message names


def find_folder(files: Iterable[Mapping[str, str]]) -> Path:
    """Returns the folder that has the files of a benchmark.

    Args:
      files: rows of `files.json`: the environment variable of the folder, a file in it, and where
        that file is published.

    Raises:
      TaskError: the variable is not set, or a file is missing; names all that are.
    """
    files = list(files)
    variable = files[0]["variable"]
    name = os.environ.get(variable)
    missing = [row for row in files if not name or not (Path(name) / row["file"]).exists()]
    if not name or missing:
        places = itertools.groupby(missing, key=lambda row: row["published"])
        listed = "; ".join(
            f"{', '.join(row['file'] for row in rows)} ({place})" for place, rows in places
        )
        raise TaskError(f"${variable}: expected a folder with {listed}, got {name or 'nothing'}")
    return Path(name)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, or a list of the lines of a `.jsonl` file.

    Raises:
      TaskError: it is no JSON, as after a download that ended early.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise TaskError(f"{path}: expected JSON, got invalid text: {error}") from error


def check_images(paths: Sequence[Path]) -> None:
    """Raises TaskError if any of the images is missing."""
    missing = sorted({path for path in paths if not path.is_file()})
    if missing:
        names = ", ".join(path.name for path in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        count = f"{len(missing):,} of {len(set(paths)):,} images are missing"
        raise TaskError(f"{missing[0].parent}: {count}: {names}{more}")


def open_image(image: Mapping[str, Any], question: Any) -> Image.Image:
    """Returns an RGB image of a column of `datasets.Image(decode=False)`.

    Raises:
      TaskError: it cannot be read; names the question.
    """
    content = image["bytes"]
    try:
        with Image.open(image["path"] if content is None else io.BytesIO(content)) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        source = image["path"] if content is None else "the publisher's file"
        raise TaskError(f"image of question {question} in {source}: {error}") from error


def dataset_of(documents: Sequence[Mapping[str, Any]]) -> Any:
    """Returns documents as a `datasets.Dataset`; `image` is a file or the bytes of one."""
    import datasets  # noqa: PLC0415  of lmms-eval, takes seconds

    made = datasets.Dataset.from_list([dict(each) for each in documents])
    return made.cast_column("image", datasets.Image(decode=False))
