"""Runs the stages of a recipe after each other, and reports.

    python -m moddistill.recipe --config experiments/llava_mod.py --workdir runs/llava_mod

Each stage has its own folder in the workdir; finished ones are skipped, an unfinished one resumes.
With a benchmark, the models of the evaluated stages answer it; the table, `predictions.jsonl` (one
field a model) and `report.html` are written at the end.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moddistill.cli import run_experiment
from moddistill.config import RecipeConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.convert.resolve import RANDOM, as_model_folder
from moddistill.data.records import check_source
from moddistill.distributed.processes import barrier, is_main_process
from moddistill.errors import UserError, at_field
from moddistill.evals.runner import evaluate, find_benchmark
from moddistill.models.flops import parameter_counts
from moddistill.reports.report import format_table, write_report
from moddistill.storage.model_folder import read_model_config, read_source
from moddistill.teachers.live import check_template
from moddistill.training.loop import LOG, start_logging, train
from moddistill.training.metrics import read_metrics
from moddistill.training.validation import check_settings

EXAMPLES = 24


def run(config: RecipeConfig, workdir: Path) -> list[dict[str, Any]]:
    """Trains, evaluates and reports; returns the rows of the table, in the first process.

    Raises:
      UserError: if the order and the stages do not name the same things, records, pictures or
        questions of any stage are missing, or a stage fails.
    """
    _check(config, workdir)
    for name in config.order:
        with at_field(f"stage {name!r}"):
            train(config.stages[name], workdir / name)
        if config.benchmark and name in config.evaluated and is_main_process():
            _evaluate(config, workdir / name)
        barrier(f"evaluating {name}")
    if not is_main_process():
        return []
    rows = table(config, workdir)
    if rows:
        write_predictions(config, workdir)
    write_report(
        workdir / "report.html",
        title=f"{workdir.name}: {' → '.join(config.order)}",
        stages={name: _curve(workdir / name) for name in config.order},
        table=rows,
        examples=_examples(config, workdir),
        loads=_loads(config, workdir),
    )
    return rows


def at_workdir(values: Any, workdir: str) -> Any:
    """Nested config values with `{workdir}` in strings replaced."""
    if isinstance(values, Mapping):
        return {key: at_workdir(value, workdir) for key, value in values.items()}
    return values.replace("{workdir}", workdir) if isinstance(values, str) else values


def table(config: RecipeConfig, workdir: Path) -> list[dict[str, Any]]:
    """One row for each evaluated model: scores, sizes and the seconds of its stage."""
    rows = []
    for name in config.evaluated:
        scores = _scores(workdir / name)
        total, activated = parameter_counts(read_model_config(workdir / name / "model"))
        rows.append(
            {
                "model": name,
                "accuracy": scores["accuracy"],
                "yes_no": scores["accuracy_yes_no"],
                "other": scores["accuracy_other"],
                "false_yes": scores["false_yes_rate"],
                "parameters": total,
                "activated": activated,
                "seconds": _curve(workdir / name)[-1]["seconds"],
            }
        )
    return rows


def write_predictions(config: RecipeConfig, workdir: Path) -> None:
    """All models' predictions side by side, one line a question."""
    columns = {name: _predictions(workdir / name) for name in config.evaluated}
    with (workdir / "predictions.jsonl").open("w") as file:
        for rows in zip(*columns.values(), strict=True):
            line = {key: rows[0][key] for key in ("question", "image", "answer")}
            line |= {name: row["prediction"] for name, row in zip(columns, rows, strict=True)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _check(config: RecipeConfig, workdir: Path) -> None:
    """Raises UserError for what would stop a later stage, before the first one takes its time."""
    for name, stage in config.stages.items():
        with at_field(f"stage {name!r}"):
            check_settings(stage)
            if (workdir / name / "model").exists():
                _check_steps(stage, workdir / name)
            else:
                _check_sources(stage, workdir)
                _check_template(config, stage, workdir)
    if sorted(config.order) != sorted(config.stages):
        raise UserError(
            f"config.order is {config.order}; accepted: each of {tuple(config.stages)} once"
        )
    unknown = [name for name in config.evaluated if name not in config.stages]
    if unknown:
        raise UserError(
            f"config.evaluated names {unknown}; accepted: stages, {', '.join(config.order)}"
        )
    if config.benchmark:
        with at_field("config.benchmark"):
            benchmark = find_benchmark(config.benchmark)
        if not all(_is_scored(workdir / name) for name in config.evaluated) and is_main_process():
            with at_field("config.benchmark_data"):
                benchmark.questions(Path(config.benchmark_data))
    elif config.evaluated:
        raise UserError(
            f"config.evaluated is {config.evaluated}, but config.benchmark is empty; accepted: a "
            "benchmark, or ()"
        )


def _check_sources(stage: TrainConfig, workdir: Path) -> None:
    """Files below the workdir are left out, since an earlier stage may make them."""
    sources = {f"sources.{name}": source for name, source in stage.data.sources.items()}
    if stage.heldout_steps:
        sources["heldout"] = stage.data.heldout
    for name, source in sources.items():
        paths = (Path(source.path), Path(source.images))
        if not any(path.resolve().is_relative_to(workdir.resolve()) for path in paths):
            with at_field(f"config.data.{name}"):
                check_source(source.path, source.images)


def _check_template(config: RecipeConfig, stage: TrainConfig, workdir: Path) -> None:
    """Compares the stage's template with its teacher's, an earlier stage's model or a folder."""
    if not stage.teacher or stage.teacher.startswith(RANDOM):
        return
    folder = Path(stage.teacher).resolve()
    if folder.name == "model" and folder.parent.parent == workdir.resolve():
        maker = config.stages.get(folder.parent.name)
        if maker is not None:
            check_template(stage, maker.data.template)
    elif folder.exists():
        with at_field("config.teacher"):
            trained_with = read_model_config(as_model_folder(stage.teacher)).template
        check_template(stage, trained_with)


def _check_steps(stage: TrainConfig, folder: Path) -> None:
    """Raises UserError if a finished stage would go on, and leave scores and later stages old."""
    steps = read_source(folder / "model").get("steps")
    if steps != stage.steps:
        raise UserError(
            f"config.steps is {stage.steps}, but {folder} is finished with {steps}; accepted: "
            f"{steps}, since later stages begin with its model, or another --workdir"
        )


def _is_scored(folder: Path) -> bool:
    return (folder / "scores.json").is_file()


def _evaluate(config: RecipeConfig, folder: Path) -> None:
    if _is_scored(folder):
        return
    data = Path(config.benchmark_data)
    scores = evaluate(folder / "model", config.benchmark, data, folder)
    LOG.info("%s: accuracy %.4f on %s", folder.name, scores["accuracy"], config.benchmark)


def _scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text())


def _predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of training, without those measured on held-out records."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def _examples(config: RecipeConfig, workdir: Path) -> list[dict[str, Any]]:
    """Questions spread evenly over the benchmark, as the first and the last model answered them."""
    if not config.evaluated:
        return []
    teacher, student = (_predictions(workdir / config.evaluated[i]) for i in (0, -1))
    stride = max(1, len(teacher) // EXAMPLES)
    return [
        {
            "image": ours["image"],
            "question": ours["question"],
            "answer": ours["answer"],
            "teacher": theirs["prediction"],
            "student": ours["prediction"],
        }
        for theirs, ours in list(zip(teacher, student, strict=True))[::stride][:EXAMPLES]
    ]


def _loads(config: RecipeConfig, workdir: Path) -> list[dict[str, Any]]:
    return (
        _scores(workdir / config.evaluated[-1]).get("expert_load", []) if config.evaluated else []
    )


def main(values: ConfigDict, workdir: str) -> None:
    """Entry point of `python -m moddistill.recipe`."""
    start_logging()
    config = from_config_dict(RecipeConfig, at_workdir(values.to_dict(), workdir))
    rows = run(config, Path(workdir))
    if rows:
        print(format_table(rows))
    if is_main_process():
        print(f"report: {workdir}/report.html")


if __name__ == "__main__":
    run_experiment(main)
