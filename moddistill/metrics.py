"""What a run reports: `metrics.jsonl`, TensorBoard, a progress bar, and the guard against NaN."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from moddistill.losses.tokens import Metrics

Row = dict[str, float | int]  # `step` and named numbers


class MetricsLog:
    """Means over the steps since the last report, and where they are written.

    Use as a context manager. Rows that a cut-off run will write again, those of steps after `start`
    and of held-out records, are removed, so each stands there once.
    """

    def __init__(self, workdir: Path, start: int, steps: int, title: str):
        self.path = workdir / "metrics.jsonl"
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= start and "loss" in row]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(
            total=steps, initial=start, desc=title, unit="step", file=sys.stderr, mininterval=1.0
        )
        self.pending: list[Metrics] = []
        self.began = self.last = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.board.close()
        self.bar.close()

    def add(self, metrics: Metrics) -> None:
        """Keeps one step's sums and weights on the device."""
        self.pending.append(metrics)

    def report(self, step: int, learning_rate: float) -> Row:
        """Writes the means since the last report; waits for the device."""
        count = len(self.pending)
        means = weighted_means(self.pending)
        self.pending = []
        now = time.monotonic()
        means["tokens_per_second"] = means.pop("tokens") * count / (now - self.last)
        row = {"step": step, "loss": means.pop("loss"), **means, "lr": learning_rate}
        row["seconds"] = self.before + now - self.began
        self.last = now
        self.write(row)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False
        )
        return row

    def write(self, row: Row) -> None:
        """Appends a row to the file and to TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])


def weighted_means(metrics: list[Metrics]) -> dict[str, float]:
    """Sum over sum of weights for every name, over steps; NaN where nothing was counted."""
    rows = jax.device_get(metrics)
    means = {}
    for name in rows[0]:
        total, weight = (sum(float(row[name][i]) for row in rows) for i in (0, 1))
        means[name] = total / weight if weight else math.nan
    return means


def check_finite(means: Row, step: int, last_good: str) -> None:
    """Raises FloatingPointError if a metric is NaN or infinite."""
    for name, value in means.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step}: {name} is {value}; the last good checkpoint is {last_good}"
            )


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
