"""Metrics of a run: `metrics.jsonl`, TensorBoard, a progress bar, and the check for NaN."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from moddistill.distributed.processes import is_main_process
from moddistill.errors import DivergedError, invalid
from moddistill.losses import Metrics
from moddistill.models.flops import StepFlops, StepSize
from moddistill.storage.text_file import append_lines, replace_text
from moddistill.training.event_file import EventFile

LOG = logging.getLogger("moddistill")

HELDOUT = "heldout_"  # begins the names of metrics of held-out records
TASKS = "eval_"  # begins the names of scores of tasks

Row = dict[str, float | int]  # `step` and named numbers
HostMetrics = dict[str, tuple[Any, Any]]  # sums and weights as numbers


class MetricsLog:
    """A context manager that averages metrics over steps and writes the means.

    Rows that a resumed run writes again, those of steps after `start`, are removed first, so that
    the file has each once.

    Args:
      start: the step that the run resumes from, or 0.
      title: of the progress bar.
      flops: from the content of a step to its FLOPs.
      peak_flops: of all devices per second, if known.
      max_skipped: steps in a row that may diverge, since they are skipped; 0 if they are not.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        steps: int,
        title: str,
        flops: Callable[[StepSize], StepFlops],
        peak_flops: float | None = None,
        max_skipped: int = 0,
    ):
        self.path = workdir / "metrics.jsonl"
        self.writes = is_main_process()
        rows = read_metrics(self.path)
        saved_rows = [row for row in rows if row["step"] <= start]
        self.before = max((row.get("seconds", 0.0) for row in saved_rows), default=0.0)
        if len(saved_rows) < len(rows):
            LOG.warning(
                "%s: rows of steps %d to %d are removed, since the steps are made again",
                self.path, start + 1, rows[-1]["step"],
            )  # fmt: skip
        evaluations = (HELDOUT, TASKS)
        self.evaluated = [row for row in saved_rows if any(n.startswith(evaluations) for n in row)]
        if self.writes:
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in saved_rows))
            self.board = EventFile(workdir / "tensorboard", start + 1)
        self.flops = flops
        self.peak_flops = peak_flops
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            unit="step",
            file=sys.stderr,
            mininterval=1.0,
            disable=not self.writes,
        )
        # A run in which all steps are skipped has trained nothing.
        self.max_skipped = max_skipped if start else min(max_skipped, steps - 1)
        self.skipped_in_a_row = 0
        self.pending: list[Metrics] = []
        self.began = self.last = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, metrics: Metrics) -> None:
        """Adds one step's sums and weights, which stay on the device until the next report.

        Waits for the step before. So the host is one step ahead, which keeps the device busy, and
        no more, since a run that is to stop has to compute what it has dispatched.
        """
        if self.pending:
            jax.block_until_ready(self.pending[-1])
        self.pending.append(metrics)

    def report(self, step: int, learning_rate: float, last_good: str) -> None:
        """Writes the means since the last report, if there are any; waits for the device.

        Raises:
          DivergedError: if one of these steps diverged, or too many in a row; nothing is written.
        """
        if not self.pending:
            return
        # One transfer for all steps since the last report.
        rows = jax.device_get(self.pending)
        self.pending = []
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            check_finite(row, number, last_good)
            self._check_divergence(row, number, last_good)
        means = weighted_means(rows)
        diverged = means.pop("diverged")
        if self.max_skipped:
            means["skipped"] = round(diverged * len(rows))
        now = time.monotonic()
        means |= self._throughput(means, len(rows) / (now - self.last))
        for name in ("tokens", "squared_lengths", "images"):
            del means[name]
        loss = means.pop("loss")
        row = {"step": step, "loss": loss, **means, "lr": learning_rate}
        row["seconds"] = self.before + now - self.began
        self.last = now
        self.write(row)
        self.bar.update(step - self.bar.n)
        text = f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
        text += f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
        self.bar.set_postfix_str(text, refresh=False)

    def _check_divergence(self, metrics: HostMetrics, step: int, last_good: str) -> None:
        if not metrics["diverged"][0]:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self.max_skipped:
            LOG.warning("step %d diverged and is skipped", step)
            return
        if self.max_skipped:
            what = f"more than {self.max_skipped} steps in a row diverged (config.max_skipped)"
        else:
            (total, weight), (norm, _) = metrics["loss"], metrics["param_norm"]
            what = (
                f"the loss, {total / weight:.4g}, or the norm of the parameters, {norm:.4g}, rose "
                "beyond config.divergence_factor"
            )
        raise DivergedError(f"step {step}: {what}; the last good checkpoint is {last_good}")

    def _throughput(self, means: Row, steps_per_second: float) -> Row:
        """Tokens and FLOPs per second of both models, and the utilisation of a known peak.

        FLOPs are those of what the steps contain: padding and recomputation do not count.
        """
        # FLOPs are linear in the content, so those of the mean content are the mean of the steps'.
        content = {name: means[name] for name in StepSize._fields}
        content["supervised"] *= means["tokens"]  # a share of the tokens
        flops = self.flops(StepSize(**content))
        throughput = {
            "tokens_per_second": means["tokens"] * steps_per_second,
            "student_tflops": flops.student * steps_per_second / 1e12,
            "teacher_tflops": flops.teacher * steps_per_second / 1e12,
        }
        if self.peak_flops:
            both = (flops.student + flops.teacher) * steps_per_second
            throughput["mfu"] = both / self.peak_flops
        return throughput

    def has(self, prefix: str, step: int) -> bool:
        """Returns whether a step has a row of metrics whose names begin with `prefix`."""
        names = [name for row in self.evaluated if row["step"] == step for name in row]
        return any(name.startswith(prefix) for name in names)

    def write_evaluation(self, step: int, values: Row) -> None:
        """Writes metrics of held-out records, or scores of tasks, after a step."""
        self.evaluated.append({"step": step} | values)
        self.write(self.evaluated[-1])

    def write(self, row: Row) -> None:
        """Appends a row to the file and to TensorBoard, in the first process."""
        if not self.writes:
            return
        # JSON has no NaN, the mean of a metric that no sample had.
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        append_lines(self.path, (json.dumps(row, allow_nan=False) + "\n").encode())
        self.board.add(row["step"], {name: x for name, x in row.items() if name != "step"})


def weighted_means(metrics: list[HostMetrics]) -> dict[str, float]:
    """Sum over sum of weights for every name, over steps; NaN where nothing was counted."""
    means = {}
    for name in metrics[0]:
        total, weight = (sum(float(row[name][i]) for row in metrics) for i in (0, 1))
        means[name] = total / weight if weight else math.nan
    return means


def check_finite(metrics: HostMetrics, step: int, last_good: str) -> None:
    """Raises DivergedError if the sum of a metric is NaN or infinite, the loss first."""
    for name in sorted(metrics, key=lambda name: name != "loss"):
        value = float(metrics[name][0])
        if not math.isfinite(value):
            raise DivergedError(
                f"step {step}: {name} is {value}; the last good checkpoint is {last_good}"
            )


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; none if it does not exist.

    A last line without a line break is incomplete, since the run was interrupted, and is left out.

    Raises:
      UserError: for any other line that is not a row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: str, origin: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        row = None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    if not whole or not all(isinstance(value, int | float) for value in row.values()):
        expected = "a JSON object of numbers with a step (the run can go on without this line)"
        raise invalid(origin, line, expected)
    return row
