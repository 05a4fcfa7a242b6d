"""Students of the demo that learn from caches of their teacher, or from another vocabulary.

    make demo
    python -m benchmarks.demo_teachers [--seeds 3] [--recipe runs/demo] [--out runs/demo_teachers]

- `d2s` and `preference` of the demo, once with the teacher in memory, once from caches with the 16
  most probable ids, once from caches with 16 drawn ids: accuracy after `d2s`, and the seconds of
  both stages and of the extractions.
- `d2d` of the demo from a cache of its teacher, from a cache of a teacher whose byte-level BPE has
  other merges, and `sft` on the same records for as many steps: on all records, and on 300 of them.

Each seed shuffles the records in another way, and draws other routers and answers. Differences of
accuracies are of all test questions of all seeds, with bootstrap intervals in which the seeds are
drawn too. Stages and evaluations that are finished are not run again.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_texts import docstring_words
from experiments import llava_mod
from moddistill.config import CacheConfig, DataConfig, SourceConfig, TrainConfig
from moddistill.data.tokenizer import train_bpe
from moddistill.evals.bootstrap import RESAMPLES, interval
from moddistill.evals.easy_vqa import TASK
from moddistill.evals.results import PREDICTIONS, is_evaluated, read_rows
from moddistill.evals.runner import TaskRun, evaluate
from moddistill.extraction.run import extract
from moddistill.storage.json_file import read_json, write_json
from moddistill.training.log_output import start_logging
from moddistill.training.loop import train

IDS = 16
CACHES = {"top_k": CacheConfig("top_k", IDS), "samples": CacheConfig("samples", IDS)}
OTHER_TOKENS = 500  # of the other teacher, whose merges are those of English documentation
TEACHER_STEPS = 2400  # of the other teacher; words are several tokens, which takes more of them
FEW, FEW_STEPS = 300, 300  # records, and the steps that they are trained for
DATA = Path("data/easy_vqa")


@dataclasses.dataclass(frozen=True)
class Runs:
    """The folder of all runs, with the seconds that each took."""

    recipe: Path
    out: Path

    def stage(self, name: str, **changes: Any) -> TrainConfig:
        """Returns a stage of the demo with other settings."""
        stage = llava_mod.demo().stages[name]
        folders = {
            field: getattr(stage, field).replace("{workdir}", str(self.recipe))
            for field in ("student", "teacher", "vision")
        }
        return dataclasses.replace(stage, **(folders | changes))

    def train(self, name: str, config: TrainConfig) -> Path:
        """Trains a stage in a folder of this name, unless it is done; returns the model."""
        model = self.out / name / "model"
        self._timed(name, model, lambda: train(config, self.out / name))
        return model

    def extract(self, name: str, config: TrainConfig, cache: CacheConfig) -> str:
        """Extracts a cache in a folder of this name, unless it is done; returns the teacher."""
        folder = self.out / name
        self._timed(name, folder / "digests.json", lambda: extract(config, cache, folder))
        return f"cache:{folder}"

    def correct(self, name: str) -> np.ndarray:
        """Returns whether the model of a stage answers each test question, as 0 and 1."""
        folder = self.out / "evaluations" / name
        if not is_evaluated(folder):
            evaluate(self.out / name / "model", [TaskRun(TASK, DATA, folder)])
        rows, _ = read_rows(folder / PREDICTIONS)
        return np.array([TASK.is_correct(row) for row in rows], float)

    def seconds(self, name: str) -> float:
        return read_json(self._seconds_file(name))["seconds"]

    def _seconds_file(self, name: str) -> Path:
        return self.out / "seconds" / f"{name.replace('/', '-')}.json"

    def _timed(self, name: str, result: Path, run: Callable[[], Any]) -> None:
        if result.exists():
            return
        begun = time.perf_counter()
        run()
        self._seconds_file(name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._seconds_file(name), {"seconds": time.perf_counter() - begun})


def cached_stages(runs: Runs, seeds: Sequence[int]) -> None:
    """Runs `d2s` and `preference` with each kind of teacher, and prints their figures."""
    for seed in seeds:
        for kind in ("live", *CACHES):
            student = runs.train(f"{kind}/d2s-{seed}", taught(runs, kind, "d2s", seed=seed))
            preference = taught(runs, kind, "preference", seed=seed, student=str(student))
            runs.train(f"{kind}/preference-{seed}", preference)
    live = [runs.correct(f"live/d2s-{seed}") for seed in seeds]
    for kind in ("live", *CACHES):
        found = [runs.correct(f"{kind}/d2s-{seed}") for seed in seeds]
        print_accuracy(f"d2s, {kind}", found, () if kind == "live" else live)
        stages = [
            [runs.seconds(f"{kind}/{stage}-{seed}") for seed in seeds]
            for stage in ("d2s", "preference")
        ]
        parts = [float(np.median(each)) for each in stages]
        if kind != "live":
            parts += [runs.seconds(f"caches/{kind}-{stage}") for stage in ("d2s", "preference")]
        print(f"  {sum(parts):.0f} seconds: " + " + ".join(f"{each:.0f}" for each in parts))


def taught(runs: Runs, kind: str, stage: str, **changes: Any) -> TrainConfig:
    """Returns a stage of the demo with one kind of teacher, from a cache made if missing."""
    if kind != "live":
        changes["teacher"] = runs.extract(f"caches/{kind}-{stage}", runs.stage(stage), CACHES[kind])
    return runs.stage(stage, **changes)


def other_vocabulary(runs: Runs, seeds: Sequence[int], records: str, **changes: Any) -> None:
    """Runs `d2d` from caches of both teachers and `sft`, and prints their figures.

    Args:
      records: their name, for folders.
      changes: settings of all three.
    """
    other = str(other_teacher(runs))
    same = runs.stage("d2d", **changes)
    caches = {"same": same, "other": dataclasses.replace(same, teacher=other)}
    kinds = {
        name: {"teacher": runs.extract(f"caches/{name}-{records}", config, CACHES["top_k"])}
        for name, config in caches.items()
    }
    kinds["sft"] = {"teacher": "", "stage": "sft"}
    found = {}
    for kind, teacher in kinds.items():
        names = [f"{kind}/{records}-{seed}" for seed in seeds]
        for name, seed in zip(names, seeds, strict=True):
            runs.train(name, runs.stage("d2d", seed=seed, **teacher, **changes))
        found[kind] = [runs.correct(name) for name in names]
        reference = () if kind == "same" else found["same"]
        print_accuracy(f"{records} records, {kind}", found[kind], reference)
    share = np.mean(found["other"]) / np.mean(found["same"])
    print(f"{records} records, accuracy of other merges / of the same: {share:.3f}")
    print_accuracy(f"{records} records, other merges against sft", found["other"], found["sft"])


def few_records(runs: Runs) -> DataConfig:
    """Returns the data of the demo with a few of the records, drawn once."""
    path = runs.out / "few.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads((DATA / "train.json").read_text())
        write_json(path, random.Random(0).sample(records, FEW))
    source = SourceConfig(path=str(path), images=str(DATA / "images"))
    return dataclasses.replace(runs.stage("d2d").data, sources={"train": source})


def other_teacher(runs: Runs) -> Path:
    """Returns a teacher that is trained like the demo's, with a tokenizer of other merges."""
    tokenizer = runs.out / "other/tokenizer"
    if not tokenizer.exists():
        train_bpe([" ".join(docstring_words())], OTHER_TOKENS).save(str(tokenizer))
    language = runs.train(
        "other/language", runs.stage("teacher_language", tokenizer=str(tokenizer))
    )
    captions = runs.train("other/captions", runs.stage("captions", student=str(language)))
    teacher = runs.stage("teacher", student=str(captions), steps=TEACHER_STEPS)
    return runs.train("other/teacher", teacher)


def print_accuracy(
    name: str, found: Sequence[np.ndarray], reference: Sequence[np.ndarray] = ()
) -> None:
    """Prints the accuracy of each seed, and the difference from a reference, seed by seed."""
    each = ", ".join(f"{answers.mean():.4f}" for answers in found)
    print(f"{name}: {np.mean(found):.4f} ({each})")
    if len(reference):
        differences = np.array(found) - np.array(reference)
        low, high = interval(replicates(differences))
        print(f"  difference {differences.mean():+.4f}, 95 % from {low:+.4f} to {high:+.4f}")


def replicates(values: np.ndarray) -> np.ndarray:
    """Returns means of values [seeds, questions] with seeds and questions drawn."""
    rng = np.random.default_rng(0)
    seeds, questions = values.shape
    return np.array(
        [
            values[rng.integers(seeds, size=seeds)]
            .mean(0)[rng.integers(questions, size=questions)]
            .mean()
            for _ in range(RESAMPLES)
        ]
    )


def main() -> None:
    """Runs what is missing and prints all figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_teachers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo_teachers"))
    args = parser.parse_args()
    start_logging()
    runs = Runs(args.recipe, args.out)
    seeds = range(args.seeds)
    cached_stages(runs, seeds)
    other_teacher(runs)
    print_accuracy("teacher with other merges", [runs.correct("other/teacher")])
    other_vocabulary(runs, seeds, "few", data=few_records(runs), steps=FEW_STEPS)
    other_vocabulary(runs, seeds, "all")


if __name__ == "__main__":
    main()
