"""Results of lmms-eval in our form; `make judge` runs it whole."""

from concurrent.futures import Future

import pytest

from moddistill import evaluate
from moddistill.evals import harness
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
    with pytest.raises(SystemExit, match=r"^error: --tasks: expected lmms-eval, which pip install"):
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
        (TaskError("$AMBER_DIR: expected a folder"), "--tasks: $AMBER_DIR: expected a folder"),
        (
            FileNotFoundError("Couldn't reach\nthe Hub"),
            "--tasks: expected the data sets of a, b in $HF_HOME, or a network to download them, "
            r"got an error: Couldn't reach\nthe Hub",
        ),
        (ConnectionError("offline"), "--tasks: expected the data sets of a, b in"),
        (KeyError("a defect keeps its traceback"), ""),
    ],
)
def test_missing_data_are_one_line(error, message, raised):
    found = harness.data_error(raised(error), ["a", "b"])
    assert found.startswith(message) and bool(found) == bool(message)
