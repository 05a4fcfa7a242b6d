"""The tasks in lmms-eval itself, where it is installed with its dependencies (`.venv-judge`)."""

import argparse
import json

import pytest

pytest.importorskip("datasets", reason="lmms-eval is installed without its dependencies")
pytest.importorskip("evaluate", reason="lmms-eval is installed without its dependencies")

from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from moddistill.errors import UserError
from moddistill.evals import harness, tasks
from moddistill.evals.tasks._task_utils import nouns
from moddistill.evals.tasks._task_utils.judge import verdicts_once
from moddistill.evals.tasks.llava_mod.utils import mmbench_accuracy

pytestmark = pytest.mark.filterwarnings("default")  # those of its dependencies


class Fixed(lmms):
    """Answers every question with the same words, after a look at its image."""

    is_simple = True

    def __init__(self, answer):
        super().__init__()
        self.answer, self.sizes = answer, []

    def generate_until(self, requests):
        for request in requests:
            _, _, images_of, number, task, split = request.args
            [image] = images_of(self.task_dict[task][split][number])
            self.sizes.append(image.size)
        return [self.answer] * len(requests)

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    """Neither NLTK's data nor spaCy's vectors."""
    for name in ("nouns", "singular_words"):
        monkeypatch.setattr(nouns, name, lambda text: text.lower().replace(".", "").split())
    monkeypatch.setattr(nouns, "load_nltk", lambda: None)
    monkeypatch.setattr(nouns.Vectors, "__init__", lambda self, model, threshold: None)
    monkeypatch.setattr(nouns.Vectors, "similar", lambda self, one, other: one == other)


@pytest.fixture(scope="module")
def manager():
    """Knows the tasks of lmms-eval and ours; reading them takes seconds."""
    return TaskManager(include_path=str(tasks.FOLDER))


@pytest.fixture
def evaluated(manager, tmp_path, monkeypatch):
    """`evaluated(task, answer)`: the scores that `moddistill.evaluate` would store."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    verdicts_once.cache_clear()

    def run(task, answer):
        model = Fixed(answer)
        found = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            cli_args=argparse.Namespace(
                output_path=str(tmp_path / "out"), process_with_media=False
            ),
        )
        assert set(model.sizes) == {(6, 4)}
        return harness.scores_of(found["results"])[task]

    return run


def test_amber(amber_folder, evaluated):
    found = evaluated("amber", "yes , sky dog")
    # Sky is in both images; a dog in none, and people imagine it in the first.
    assert (found["amber_chair"], found["amber_cover"]) == (50, 50)
    assert (found["amber_hal"], found["amber_cog"]) == (100, pytest.approx(100 / 3))
    assert (found["amber_accuracy"], found["amber_recall"], found["amber_f1"]) == (50, 0, 0)
    assert (found["amber_accuracy_existence"], found["amber_accuracy_relation"]) == (0, 100)
    assert found["amber_score"] == 25
    assert "amber_precision" not in found  # no answer is no


@pytest.mark.parametrize("part", ["generative", "discriminative"])
def test_parts_of_amber(part, amber_folder, evaluated):
    found = evaluated(f"amber_{part}", "no sky")
    assert ("amber_chair" in found) == (part == "generative")
    assert ("amber_f1_attribute" in found) == (part == "discriminative")
    assert "amber_score" not in found


def test_object_halbench(halbench_folder, evaluated):
    found = evaluated("object_halbench", "a man and a train")
    assert found == {
        "object_halbench_response": 100,
        "object_halbench_mention": 50,
        "object_halbench_all_responses": 100,
        "object_halbench_recall": pytest.approx(100 * 2 / 3),
        "object_halbench_with_objects": 2,
        "object_halbench_words": 5,
    }


def test_mmhal_bench(mmhal_folder, judge_server, evaluated, tmp_path):
    judge_server.reply = lambda prompt: "Rating: 2" if "Question 1?" in prompt else "Rating: 5"
    found = evaluated("mmhal_bench", "Yellow.")
    assert (found["mmhal_score"], found["mmhal_hallucination_rate"]) == (4, pytest.approx(100 / 3))
    assert (found["mmhal_score_attribute"], found["mmhal_score_other"]) == (5, 2)
    assert (found["mmhal_answers"], found["mmhal_missing_verdicts"]) == (3, 0)
    answers = json.loads((tmp_path / "out/submissions/mmhal_bench_answers.json").read_text())
    assert [row["model_answer"] for row in answers] == ["Yellow."] * 3
    assert len(judge_server.requests) == 3


def test_a_judge_that_does_not_answer_is_asked_once_for_all_metrics(
    mmhal_folder, judge_server, evaluated, monkeypatch
):
    monkeypatch.setenv("JUDGE_TRIES", "1")
    judge_server.reply = lambda prompt: 503
    assert evaluated("mmhal_bench", "Yellow.")["mmhal_missing_verdicts"] == 3
    assert len(judge_server.requests) == 3


@pytest.mark.parametrize("name", ["textvqa_val", "mmbench_en_dev", "mmbench_cn_dev"])
def test_functions_of_prompt_variants_are_those_of_lmms_eval(name):
    path = tasks.FOLDER / f"llava_mod/{name}_llava_mod.yaml"
    found = load_yaml_config(str(path))
    assert found["process_results"].__module__.startswith("lmms_eval.tasks.")
    assert all(
        callable(each["aggregation"]) or each["aggregation"] == "mean"
        for each in found["metric_list"]
    )


def test_letters_of_mmbench_are_read_by_rules():
    cells = {"question": "?", "hint": "nan", "source": "s", "split": "dev", "category": "c"}
    options = {"L2-category": "d", "A": "a cat", "B": "a dog", "C": "nan", "D": "nan", "E": "nan"}
    answers = ["B", "B. a dog", "The answer is (B).", "A", "I do not know"]
    rows = [
        {"index": number, "answer": "B", "prediction": text, **cells, **options}
        for number, text in enumerate(answers)
    ]
    assert mmbench_accuracy(rows) == 60


@pytest.mark.slow  # lmms-eval loads the data five times, with pauses
def test_missing_files_are_one_line_of_the_command(tiny_models, tmp_path, monkeypatch):
    monkeypatch.delenv("AMBER_DIR", raising=False)
    with pytest.raises(UserError, match=r"^--tasks: \$AMBER_DIR: expected a folder with data"):
        harness.evaluate_tasks(str(tiny_models["dense"]), ["amber"], tmp_path / "out", {})
