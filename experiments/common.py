"""The argument of `get_config`, and the demo and tiny sizes, shared by all experiments."""

import contextlib
import dataclasses
import getpass
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from experiments.data import sources
from moddistill.config import DataConfig, SourceConfig, TrainConfig
from moddistill.configdict import to_config_dict
from moddistill.data.tokenizer import train_bpe
from moddistill.errors import invalid, not_one_of
from moddistill.models.presets import preset

SIZES = ("full", "demo", "tiny")
STUDENT = "qwen1.5-1.8b"  # the pair of the paper's ablations
TEACHER = "qwen1.5-7b"
EASY_VQA = "data/easy_vqa"
DEMO_LENGTH = 272  # tokens of a row, which holds four questions with their images and answers
_ARGUMENT = "experiment argument"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """Models of a full-size recipe, and the format that they are trained in.

    Attributes:
      student: folder or hub name that the first stage starts from.
      teacher: folder or hub name of the teacher.
      runs: folder with one workdir per stage.
      has_projector: the student's projector is trained, so the recipe begins with `d2d`.
      template: conversation format, here that of the teacher too.
      max_length: tokens of a row and of a sample, image patches included.
      samples_per_row: average number of samples in a packed row.
      pairs_per_row: average number of pairs of answers.

    The averages are of 102,400 samples with LLaVA-like lengths, packed by best fit, the longest
    first, within windows of 1,024: an image, and text that is log-normal with median 90 and 95th
    percentile 500. With 576 tokens an image, rows of 2,048 hold 2.56 samples (9 % is padding); with
    729, rows of 2,304 hold 2.20 (16 %). Of a pair the longer answer counts: 2.56 and 2.20 if both
    have equal lengths, 2.29 and 1.99 if their lengths are independent, and the middle here.
    """

    student: str
    teacher: str
    runs: str
    has_projector: bool = False
    template: str = "vicuna"
    max_length: int = 2048
    samples_per_row: float = 2.56
    pairs_per_row: float = 2.42

    def after(self, stage: str) -> str:
        """Returns the model of `stage`; for an `init` that is not needed, the published student."""
        if stage == "init" and self.has_projector:
            return self.student
        return f"{self.runs}/{stage}/model"

    def data(self, stage: str) -> DataConfig:
        """Returns the paper's records of a stage, in the format of the models."""
        return DataConfig(
            sources=sources(stage),
            template=self.template,
            max_length=self.max_length,
            max_images=16,  # the reference's limit
        )


# Published teachers, each with a student; docs/teachers.md has their origin and licences.
PAIRS = {
    "interleave": Models(
        student="llava-hf/llava-interleave-qwen-0.5b-hf",
        teacher="llava-hf/llava-interleave-qwen-7b-hf",
        runs="runs/llava-interleave-qwen-0.5b-hf",
        has_projector=True,
        template="chatml",
        max_length=2304,  # an image takes 729 of them, which leaves more text than 2,048 with 576
        samples_per_row=2.20,
        pairs_per_row=2.09,
    ),
    "long-llava": Models(
        student="models/qwen2-0.5b",
        teacher="aws-prototyping/long-llava-qwen2-7b",
        runs="runs/long-llava/qwen2-0.5b",
        template="chatml",
    ),
}


def parse(arg: str | None) -> tuple[str, Models]:
    """Parses an experiment argument into a size and the models of the full size.

    Args:
      arg: `demo`, `tiny`, `student=PRESET`, `teacher=PRESET` or `pair=NAME`, separated by commas.

    Raises:
      UserError: for anything else, models at a smaller size, which has its own, or a pair together
        with a student or teacher.
    """
    options: dict[str, str] = {}
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        key = "size" if item in SIZES else key
        if key in options:
            raise invalid(_ARGUMENT, arg, f"one {key}")
        if item in SIZES:
            options["size"] = item
        elif key in ("student", "teacher") and value:
            preset(value)
            options[key] = value
        elif key == "pair" and value:
            options[key] = _known_pair(value)
        else:
            known = (*SIZES, "student=PRESET", "teacher=PRESET", *(f"pair={x}" for x in PAIRS))
            raise not_one_of(_ARGUMENT, item, known)
    size = options.pop("size", "full")
    if options and size != "full":
        raise invalid(_ARGUMENT, arg, f"{size!r} by itself, since it has its own models")
    if "pair" in options:
        return size, _pair(options, arg)
    return size, presets(**options)


def presets(student: str = STUDENT, teacher: str = TEACHER) -> Models:
    """Returns a student imported to `models/` and a teacher trained by stage `sft`."""
    return Models(
        student=f"models/{student}", teacher=f"runs/{teacher}/sft/model", runs=f"runs/{student}"
    )


def _known_pair(name: str) -> str:
    if name not in PAIRS:
        raise not_one_of(f"{_ARGUMENT} pair", name, PAIRS)
    return name


def _pair(options: dict[str, str], arg: str | None) -> Models:
    if set(options) != {"pair"}:
        raise invalid(_ARGUMENT, arg, "a pair by itself, since it names both models")
    return PAIRS[options["pair"]]


def rows(samples: int, per_row: float) -> int:
    """Returns the rows that hold about `samples` samples: a multiple of 16, to divide by devices.

    Args:
      per_row: average number of samples in a packed row.
    """
    return 16 * round(samples / per_row / 16)


def choose(
    arg: str | None, *, full: Callable[[Models], Any], **smaller: Callable[[], Any]
) -> ml_collections.ConfigDict:
    """Returns the config of the size that `arg` names; `full` receives the models."""
    size, models = parse(arg)
    if size == "full":
        return to_config_dict(full(models))
    if size not in smaller:
        raise not_one_of(_ARGUMENT, size, ("full", *smaller))
    return to_config_dict(smaller[size]())


def source(file: str, images: str = "data/images") -> dict[str, SourceConfig]:
    """Returns one source of records, named after its file."""
    return {Path(file).stem: SourceConfig(path=file, images=images)}


def easy_vqa(name: str) -> dict[str, SourceConfig]:
    """Returns a source of the demo, as `python -m tools.easy_vqa` writes it."""
    return source(f"{EASY_VQA}/{name}.json", f"{EASY_VQA}/images")


def tiny_data() -> Path:
    """Returns a folder with small images, records of both kinds and a tokenizer.

    The content is always the same; the folder is written once per release and user.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes() + getpass.getuser().encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"moddistill-tiny-{digest[:8]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as tmp_dir:
            data = Path(tmp_dir) / "data"
            write_tiny_data(data)
            with contextlib.suppress(OSError):  # another process was first
                data.rename(folder)
    return folder


def write_tiny_data(folder: Path) -> None:
    """Writes the folder, with the same bytes each time."""
    folder.mkdir()
    colours = {
        "red": (220, 30, 30),
        "green": (30, 200, 60),
        "blue": (40, 60, 220),
        "grey": (128,) * 3,
    }
    questions = [("<image>\nwhat colour is it?", name) for name in colours]
    questions += [(f"<image>\nis it {name}?", "yes") for name in colours]
    conversations, preferences = [], []
    rng = np.random.default_rng(0)
    for i, (question, answer) in enumerate(questions):
        pixels = np.clip(list(colours.values())[i % 4] + rng.normal(0, 9, (20, 28, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        record = {"id": str(i), "image": f"{i}.png"}
        human = {"from": "human", "value": question}
        conversations.append(record | {"conversations": [human, {"from": "gpt", "value": answer}]})
        preferences.append(
            record | {"conversations": [human], "chosen": answer, "rejected": f"not {answer}"}
        )
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "preferences.json").write_text(json.dumps(preferences))
    train_bpe((json.dumps(conversations),), 300).save(str(folder / "tokenizer"))


def at_demo_size(config: TrainConfig, rows: int = 8) -> TrainConfig:
    """Returns the stage for two CPU cores: Qwen's conversation format, float32 throughout.

    Args:
      rows: of a step; the default holds 32 samples with an image.
    """
    data = dataclasses.replace(config.data, template="chatml", max_length=DEMO_LENGTH)
    return dataclasses.replace(
        config,
        batch_size=rows,
        log_every=10,
        save_every=10_000,
        dtype="float32",
        remat="none",
        data=data,
        optim=dataclasses.replace(config.optim, warmup_ratio=0.05),
    )


def at_tiny_size(config: TrainConfig) -> TrainConfig:
    """Returns the stage for tests, of a few seconds, with its own records and models."""
    folder = tiny_data()
    kind = "preferences" if config.stage == "preference" else "conversations"
    return dataclasses.replace(
        config,
        tokenizer=str(folder / "tokenizer"),
        steps=4,
        batch_size=8,
        log_every=1,
        save_every=2,
        dtype="float32",
        data=DataConfig(sources=source(f"{folder}/{kind}.json", str(folder)), max_length=200),
        optim=dataclasses.replace(config.optim, lr=1e-3, warmup_ratio=0.0),
    )
