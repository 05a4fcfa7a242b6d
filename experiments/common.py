"""What all experiments share: the argument of `get_config`, and records for the smallest size."""

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

from moddistill.config import DataConfig, SourceConfig, TrainConfig, nearest, to_config_dict
from moddistill.data.tokenizer import train_bpe
from moddistill.models.presets import preset

SIZES = ("full", "demo", "tiny")
STUDENT = "qwen1.5-1.8b"  # the pair of the paper's ablations
TEACHER = "qwen1.5-7b"
EASY_VQA = "data/easy_vqa"
DEMO_LENGTH = 70  # tokens of the longest question with its picture and answer


def parse(arg: str | None) -> dict[str, str]:
    """`demo`, `tiny`, `student=PRESET` and `teacher=PRESET`, separated by commas.

    Raises:
      ValueError: for anything else, or a preset for a smaller size, which has its own models.
    """
    options = {"size": "full"}
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        if item in SIZES:
            options["size"] = item
        elif key in ("student", "teacher") and value:
            preset(value)
            options[key] = value
        else:
            known = (*SIZES, "student=PRESET", "teacher=PRESET")
            raise ValueError(
                f"experiment argument {item!r} is unknown; accepted: {', '.join(known)}"
                + nearest(item, known)
            )
    chosen = sorted({"student", "teacher"} & set(options))
    if chosen and options["size"] != "full":
        raise ValueError(
            f"experiment argument {arg!r} sets {' and '.join(chosen)}, but {options['size']} has "
            "its own models; accepted: presets at full size, or the size alone"
        )
    return {"student": STUDENT, "teacher": TEACHER} | options


def choose(
    arg: str | None, *, full: Callable[[str, str], Any], **smaller: Callable[[], Any]
) -> ml_collections.ConfigDict:
    """The config of the size that `arg` names; `full` gets the presets of student and teacher."""
    options = parse(arg)
    size = options["size"]
    if size == "full":
        return to_config_dict(full(options["student"], options["teacher"]))
    if size not in smaller:
        raise ValueError(f"there is no size {size!r} here; accepted: full, {', '.join(smaller)}")
    return to_config_dict(smaller[size]())


def source(file: str, images: str = "data/images") -> dict[str, SourceConfig]:
    """One source of records by the name of its file."""
    return {Path(file).stem: SourceConfig(path=file, images=images)}


def easy_vqa(name: str) -> dict[str, SourceConfig]:
    """Records of the demo, as `python -m tools.easy_vqa` writes them."""
    return source(f"{EASY_VQA}/{name}.json", f"{EASY_VQA}/images")


def tiny_data() -> Path:
    """A folder with small pictures, records of both kinds and a tokenizer, always the same."""
    # By content, so that neither another release nor another user's folder is taken for it.
    digest = hashlib.sha256(Path(__file__).read_bytes() + getpass.getuser().encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"moddistill-tiny-{digest[:8]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as aside:
            made = Path(aside) / "data"
            write_tiny_data(made)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder


def write_tiny_data(folder: Path) -> None:
    """Makes the folder; the same bytes each time."""
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


def at_demo_size(config: TrainConfig) -> TrainConfig:
    """The stage for two CPU cores, with the conversation format of Qwen and float32 throughout."""
    length = min(config.data.max_length, DEMO_LENGTH)
    data = dataclasses.replace(config.data, template="chatml", max_length=length)
    return dataclasses.replace(
        config,
        batch_size=32,
        log_every=10,
        save_every=10_000,
        dtype="float32",
        remat="none",
        data=data,
        optim=dataclasses.replace(config.optim, warmup_ratio=0.05),
    )


def at_tiny_size(config: TrainConfig) -> TrainConfig:
    """The stage for tests: seconds, with records and models of its own."""
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
