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


class MetricsLog:
    """Means over the steps since the last report, and where they are written.

    Use as a context manager. Rows of steps after `start`, left by a run that was cut off behind its
    last checkpoint, are removed, so each step stands there once.
    """

    def __init__(self, workdir: Path, start: int, steps: int, title: str):
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= start]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
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

    def report(self, step: int, learning_rate: float) -> dict[str, float]:
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

    def write(self, row: dict[str, float]) -> None:
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


def check_finite(means: dict[str, float], step: int, last_good: str) -> None:
    """Raises FloatingPointError if a metric is NaN or infinite."""
    for name, value in means.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step}: {name} is {value}; the last good checkpoint is {last_good}"
            )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
