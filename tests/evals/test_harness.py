"""Results of lmms-eval in our form; `make judge` runs it whole."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from PIL import Image

from moddistill import evaluate
from moddistill.errors import UserError
from moddistill.evals import harness
from moddistill.evals import samples as samples_module
from moddistill.evals.tasks._task_utils.errors import TaskError


class Retried(Exception):
    """As lmms-eval raises it, which loads data several times."""

    def __init__(self, error):
        self.last_attempt = Future()
        self.last_attempt.set_exception(error)


def test_scores_have_the_names_of_the_metrics():
    """As lmms-eval 0.7.3 gives them."""
    results = {
        "mme": {
            "alias": "mme",
            "mme_perception_score,none": 1200.5,
            "mme_perception_score_stderr,none": "N/A",
            " ": "",
        },
        "mmstar": {"average,none": 0.31, "average_stderr,none": 0.02},
        "mixed": {"acc,none": 0.5, "acc,flexible": 0.6},
    }
    assert harness.scores_of(results) == {
        "mme": {"mme_perception_score": 1200.5},
        "mmstar": {"average": 0.31, "average_stderr": 0.02},
        "mixed": {"acc,none": 0.5, "acc,flexible": 0.6},
    }


def test_tasks_need_lmms_eval(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--model", str(tiny_models["dense"]), "--tasks", "mme", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^error: --tasks: expected lmms-eval, which pip"):
        evaluate.main(flags)


def test_results_do_not_go_into_a_model_folder(tiny_models):
    folder = str(tiny_models["dense"])
    with pytest.raises(SystemExit, match=r"^error: --out: expected a folder outside of"):
        evaluate.main(["--model", folder, "--tasks", "mme", "--out", f"{folder}/scores"])


@pytest.mark.parametrize("flags", [["--task", "easy_vqa"], ["--tasks", "mme", "--data", "d"]])
def test_data_belong_to_a_task_of_this_library(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "m", "--out", "o", *flags])
    assert "--data: expected with --task, and only there" in capsys.readouterr().err


@pytest.mark.parametrize("raised", [lambda error: error, Retried])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TaskError("$AMBER_DIR: expected a folder"), "$AMBER_DIR: expected a folder"),
        (
            FileNotFoundError("Couldn't reach\nthe Hub"),
            "expected its data set in $HF_HOME, or a network to download it, got an error: "
            r"Couldn't reach\nthe Hub",
        ),
        (ConnectionError("offline"), "expected its data set in"),
        (KeyError("a defect keeps its traceback"), ""),
    ],
)
def test_missing_data_are_one_line(error, message, raised):
    found = harness._known_reason(raised(error))
    assert found.startswith(message) and bool(found) == bool(message)


# Tasks that fail or are finished, with lmms-eval replaced by what it gives.


class Loaded:
    """A model of lmms-eval, with the data set that its task read."""

    def __init__(self, image):
        docs = [{"image": image, "question": "is it red?"}, {"image": image, "question": "and?"}]
        self.task_dict = {"good": {"test": docs}}

    def expert_load(self):
        return [{"layer": 0, "image": [1.0], "text": [1.0]}]


def results_of(task):
    """As lmms-eval 0.7.3 gives them: a task with a number and an object for each question."""
    samples = [
        {
            "doc_id": number,
            "doc": {"question": "q"},
            "target": ["yes", "no"][number],
            "arguments": ["is it red?", {"max_new_tokens": 4}],
            "resps": [["yes"]],
            "filtered_resps": ["yes"],
            "doc_hash": "x",
            "exact_match": 1.0 - number,
            "mme_perception_score": {"question_id": "a.png", "score": 1.0 - number},
        }
        for number in range(2)
    ]
    return {
        "results": {task: {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}},
        "samples": {task: samples},
        "configs": {task: {"test_split": "test"}},
    }


@pytest.fixture
def run(tiny_models, tmp_path, monkeypatch):
    """`run(tasks, faults)`: the reasons of failures; `run.evaluated` are tasks that ran."""

    def evaluate(loaded, task, manager, out, limit):
        run.evaluated.append(task)
        if task in run.faults:
            raise run.faults[task]
        return results_of(task)

    def run(tasks, faults=None, model="dense"):
        run.evaluated, run.faults = [], faults or {}
        folder = str(tiny_models[model])
        return harness.run_tasks(folder, tasks, tmp_path, {"dtype": "float32"})

    manager = SimpleNamespace(all_tasks=["good", "offline", "broken"])
    monkeypatch.setattr(harness, "_task_manager", lambda *_: manager)
    monkeypatch.setattr(harness, "_load", lambda arguments: Loaded(Image.new("RGB", (600, 300))))
    monkeypatch.setattr(harness, "_evaluate", evaluate)
    run.out = tmp_path
    return run


def wrapped(error):
    """An error as tenacity raises it after the last attempt."""
    outer = RuntimeError("RetryError[<Future>]")
    outer.__cause__ = error
    return outer


def test_a_task_that_fails_does_not_stop_the_others(run, capsys):
    faults = {"offline": wrapped(ConnectionError("no hub")), "broken": KeyError("answer")}
    failures = run(["offline", "broken", "unknown", "good"], faults)
    assert failures["offline"].startswith("expected its data set in $HF_HOME, or a network")
    assert failures["offline"].endswith("no hub")
    assert failures["broken"] == "expected a task that runs, got KeyError: 'answer'"
    assert failures["unknown"] == "expected a task of lmms-eval, got 'unknown'"
    assert "Traceback" in capsys.readouterr().err  # of the broken one
    scores = json.loads((run.out / "scores.json").read_text())
    assert scores["good"]["exact_match"] == 0.5
    assert scores["good"]["expert_load"] == [{"layer": 0, "image": [1.0], "text": [1.0]}]


def test_finished_tasks_are_not_evaluated_again(run):
    run(["good", "broken"], {"broken": KeyError("answer")})
    assert run(["good", "broken"]) == {}
    assert run.evaluated == ["broken"]
    assert set(json.loads((run.out / "scores.json").read_text())) == {"good", "broken"}


def test_a_task_that_lacks_verdicts_is_evaluated_again_if_there_is_a_judge(run, monkeypatch):
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    run(["good", "broken"])
    file = run.out / "scores.json"
    scores = json.loads(file.read_text())
    scores["good"]["mmhal_missing_verdicts"] = 3
    scores["broken"]["mmhal_missing_verdicts"] = 0
    file.write_text(json.dumps(scores))
    run(["good", "broken"])
    assert run.evaluated == []
    monkeypatch.setenv("JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    reason = "$JUDGE_MODEL: expected the name"
    assert run(["good", "broken"], {"good": TaskError(reason)}) == {"good": reason}
    assert json.loads(file.read_text()) == scores  # as they were
    run(["good", "broken"])
    assert run.evaluated == ["good"]
    assert "mmhal_missing_verdicts" not in json.loads(file.read_text())["good"]


def test_another_model_needs_another_folder(run):
    run(["good"])
    with pytest.raises(UserError, match=r"expected results of model .*choose another --out"):
        run(["good"], model="sparse")


def test_samples_have_the_values_of_each_metric_and_images(run):
    run(["good"])
    lines = (run.out / "samples" / "good.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[1] == {
        "id": "1",
        "question": "is it red?",
        "images": ["images/good/1-0.jpg"],
        "answers": ["no"],
        "prediction": "yes",
        "metrics": {
            "exact_match": 0.0,
            "mme_perception_score": {"question_id": "a.png", "score": 0.0},
        },
    }
    with Image.open(run.out / "samples" / rows[0]["images"][0]) as image:
        assert image.size == (256, 128)


def test_images_that_are_not_decoded_are_saved_too(image, tmp_path):
    """`datasets.Image(decode=False)`, as the tasks of this library have them."""
    path = image(0)
    with open(path, "rb") as file:
        stored = {"bytes": file.read(), "path": None}
    doc = {"a": stored, "b": {"bytes": None, "path": path}, "c": {"bytes": b"no", "path": ""}}
    names = samples_module._thumbnails(doc | {"d": {"x": 1}}, tmp_path / "images" / "t", 5)
    assert names == ["images/t/5-0.jpg", "images/t/5-1.jpg"]
    assert all((tmp_path / name).is_file() for name in names)


def test_images_with_transparent_pixels_are_saved_too(tmp_path):
    doc = {"image": Image.new("RGBA", (6, 3))}
    assert samples_module._thumbnails(doc, tmp_path / "images" / "t", 5) == ["images/t/5-0.jpg"]


def test_of_images_that_cannot_be_decoded_none_is_saved(tmp_path):
    file = tmp_path / "noise.png"
    Image.effect_noise((400, 400), 90).save(file)
    whole = file.read_bytes()
    place = whole.rindex(
        b"IDAT"
    )  # of the last chunk of pixels, whose name is made one that none has
    doc = {
        "cut": {"bytes": whole[: len(whole) // 2], "path": None},
        "broken": {"bytes": whole[:place] + bytes(4) + whole[place + 4 :], "path": None},
        "gone": {"bytes": None, "path": str(tmp_path / "gone.png")},
    }
    assert samples_module._thumbnails(doc, tmp_path / "images" / "t", 5) == []


def test_images_are_saved_of_examples_and_of_questions_that_are_not_right():
    samples = [{"doc_id": i, "exact_match": float(i % 100 != 7)} for i in range(1000)]
    shown = samples_module._shown(samples)
    assert shown >= {7, 107, 907} and len(shown) == samples_module.EXAMPLES + 10
    assert samples_module.score_of({"submission": {"id": 1}, "vqa": 0.3}) == 0.3
    assert samples_module.score_of({"submission": {"id": 1}}) is None


def test_failed_tasks_are_an_error_of_the_command_after_the_others(run, tiny_models):
    flags = ["--model", str(tiny_models["dense"]), "--out", str(run.out)]
    run.evaluated, run.faults = [], {"broken": KeyError("answer")}
    with pytest.raises(SystemExit, match=r"^error: --tasks: broken: expected a task that runs"):
        evaluate.main([*flags, "--dtype", "float32", "--tasks", "broken,good"])
    assert "good" in json.loads((run.out / "scores.json").read_text())
