"""Samples a second of reading, decoding, padding, resizing to 336 and tokenizing.

    python -m benchmarks.data_loading [--seconds 8] [--rounds 5] [--json]

LLaVA's records, English text and a JPEG file of about 500 pixels each (`benchmarks.data_texts`,
`benchmarks.photographs`), Qwen's tokenizer, batches of 16 rows.

- moddistill: `pipeline.Batches` with and without packing, with 0 and 2 workers.
- torch: a `DataLoader` with 0, 1, 2 and 4 workers, whose data set pads images to a square as LLaVA
  does and calls `CLIPImageProcessor` and Qwen's tokenizer of `transformers`. With torchvision the
  processor is the one that uses it.

Each measurement has a process of its own, and counts the samples of the time after the first batch.
All sides alternate; figures are medians. `ratio` is the better of moddistill's worker counts, in
rows of one sample, relative to torch's best; `workers` is its speed with 2 workers relative to
none, the median of the rounds.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import cpu_seconds, in_new_process

RECORDS, ROWS = 2000, 16
SIDES = {
    **{f"moddistill, {workers} workers": ("unpacked", workers) for workers in (0, 2)},
    **{f"moddistill packed, {workers} workers": ("packed", workers) for workers in (0, 2)},
    **{f"torch, {workers} workers": ("torch", workers) for workers in (0, 1, 2, 4)},
}


def write_files(folder: Path, records: int) -> str:
    """Writes records, images and the tokenizer; returns what the images show."""
    from benchmarks.data_texts import Conversations, qwen_tokenizer
    from benchmarks.photographs import write_jpegs

    shown = write_jpegs(folder, records)
    conversations = Conversations(qwen_tokenizer(folder / "qwen"))
    with (folder / "records.jsonl").open("w") as file:
        for number in range(records):
            fields = {"image": f"{number:05d}.jpg", "conversations": conversations.make()}
            file.write(json.dumps(fields) + "\n")
    return shown


def moddistill_batches(folder: Path, packing: bool, workers: int) -> Iterator[int]:
    """Yields the number of samples of each batch."""
    from benchmarks.data_index import SPEC
    from benchmarks.data_texts import qwen_tokenizer
    from moddistill.config import DataConfig, SourceConfig
    from moddistill.data.pipeline import Batches, open_sources, plan_rows
    from moddistill.data.rows import RowMaker, needed_image_slots

    tokenizer = qwen_tokenizer(folder / "qwen")
    source = SourceConfig(str(folder / "records.jsonl"), str(folder))
    config = DataConfig({"llava": source}, template=SPEC.template, packing=packing)
    sources = open_sources(config, SPEC, tokenizer)
    plan, slots = plan_rows(config, sources, seed=0), needed_image_slots(sources, packing)
    batches = Batches(
        RowMaker(plan, sources, tokenizer, SPEC, slots),
        local_rows=range(ROWS),
        batch_size=ROWS,
        workers=workers,
        timeout=60,
        lists=folder,
        max_rejected=0.0,
    )
    try:
        for batch in batches:
            yield int(batch.segments.max(axis=1).sum())
    finally:
        batches.close()


class HuggingFaceSamples:
    """A map-style data set, as LLaVA's `LazySupervisedDataset`."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer, CLIPImageProcessor

        from moddistill.data.chat_template import VICUNA_SYSTEM

        self.folder, self.system = folder, VICUNA_SYSTEM
        lines = (folder / "records.jsonl").read_text().splitlines()
        self.records = [json.loads(line) for line in lines]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "qwen")
        size = {"height": 336, "width": 336}
        self.processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record = self.records[number]
        turns = record["conversations"]
        roles = {"human": " USER: ", "gpt": " ASSISTANT: "}
        text = self.system + "".join(roles[turn["from"]] + turn["value"] for turn in turns)
        ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=2048)
        image = self._square(self.folder / record["image"])
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"ids": ids["input_ids"][0], "pixels": pixels}

    def _square(self, path: Path) -> Any:
        from PIL import Image

        image = Image.open(path).convert("RGB")
        width, height = image.size
        side = max(width, height)
        color = tuple(int(255 * mean) for mean in self.processor.image_mean)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads the ids of a batch to the longest and stacks the images."""
    import torch

    ids = [sample["ids"] for sample in samples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"ids": padded, "pixels": torch.stack([sample["pixels"] for sample in samples])}


def torch_batches(folder: Path, workers: int) -> Iterator[int]:
    """Yields the number of samples of each batch."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        HuggingFaceSamples(folder),
        ROWS,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        # The default on Linux, but not in a process that is itself spawned.
        multiprocessing_context="fork" if workers else None,
    )
    while True:
        for batch in loader:
            yield len(batch["ids"])


def speed(folder: Path, kind: str, workers: int, seconds: float) -> dict[str, float]:
    """Returns samples a second, and CPU milliseconds of a sample, from the first batch on."""
    if kind == "torch":
        batches = torch_batches(folder, workers)
    else:
        batches = moddistill_batches(folder, kind == "packed", workers)
    next(batches)
    began, cpu, samples = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < seconds:
        samples += next(batches)
    taken, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    batches.close()
    return {"samples_per_second": samples / taken, "cpu_ms": 1000 * cpu / samples}


def compare(
    seconds: float, rounds: int, records: int = RECORDS, sides: dict[str, tuple[str, int]] = SIDES
) -> dict[str, Any]:
    """Returns samples a second of all sides, and the ratios of the best ones."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        shown = in_new_process(write_files, Path(name), records)
        for _ in range(rounds):
            for side, (kind, workers) in sides.items():
                found[side].append(in_new_process(speed, Path(name), kind, workers, seconds))
    medians = {
        side: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for side, rows in found.items()
    }

    def best(wanted: str) -> float:
        names = [side for side, (kind, _) in sides.items() if kind == wanted]
        return max((medians[side]["samples_per_second"] for side in names), default=math.nan)

    def workers(wanted: str) -> float:
        none, two = (
            [row["samples_per_second"] for side in found if sides[side] == (wanted, count)
             for row in found[side]]
            for count in (0, 2)
        )  # fmt: skip
        return statistics.median([b / a for a, b in zip(none, two, strict=False)] or [math.nan])

    return {
        "images": shown,
        "torchvision": importlib.util.find_spec("torchvision") is not None,
        "load": os.getloadavg()[0],
        "sides": medians,
        "ratio": best("unpacked") / best("torch"),
        "ratio_packed": best("packed") / best("torch"),
        "workers": workers("unpacked"),
        "workers_packed": workers("packed"),
    }


def main() -> None:
    """Entry point of `python -m benchmarks.data_loading`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loading", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = compare(args.seconds, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for side, figures in result["sides"].items():
        speed_, cpu = figures["samples_per_second"], figures["cpu_ms"]
        print(f"{side:>30} {speed_:7.1f} samples/s, {cpu:5.2f} CPU ms a sample")
    for name in ("ratio", "ratio_packed", "workers", "workers_packed"):
        print(f"{name}: {result[name]:.2f}")


if __name__ == "__main__":
    main()
