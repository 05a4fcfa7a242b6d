import json
import shutil

import numpy as np
import pytest
from PIL import Image

from moddistill import evaluate as command
from moddistill.convert.resolve import load
from moddistill.errors import UserError
from moddistill.evals import easy_vqa, runner
from moddistill.evals.runner import TaskRun, evaluate, find_task
from moddistill.inference import batching
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer, generate
from moddistill.inference.loading import load_with_tokenizer
from moddistill.inference.prompts import Prompt
from tests.evals import counting

QUESTIONS = [("what colour is it?", "red"), ("is it red?", "yes"), ("is it blue?", "no")]
COUNTING = [
    ("say something", [], ["yes"]),
    ("<image>\nwhat is it?", ["images/0.png"], ["red", "a red one"]),
    ("is <image> like <image>?", ["images/0.png", "images/1.png"], ["no"]),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images with questions of both tasks in their formats."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    records = []
    for i, (question, reply) in enumerate(QUESTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": reply},
        ]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "test.json").write_text(json.dumps(records))
    names = ("prompt", "images", "answers")
    counted = [{"id": str(i)} | dict(zip(names, x, strict=True)) for i, x in enumerate(COUNTING)]
    (folder / "questions.json").write_text(json.dumps(counted))
    return folder


@pytest.fixture(scope="module")
def results(data, tiny_models, tmp_path_factory):
    """Scores and result folders of a sparse model on both tasks, in batches of two."""
    out = tmp_path_factory.mktemp("results")
    runs = [
        TaskRun(easy_vqa.TASK, data, out / "easy_vqa"),
        TaskRun(counting.TASK, data, out / "counting"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batching, "MAX_ROWS", 2)
        scores = evaluate(tiny_models["sparse"], runs)
    return dict(zip(("easy_vqa", "counting"), scores, strict=True)), out


def rows_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_predictions_are_the_greedy_answers(results, data, tiny_models, tokenizer):
    model = load(tiny_models["sparse"])
    rows = rows_of(results[1] / "easy_vqa")
    for i, (row, (question, reply)) in enumerate(zip(rows, QUESTIONS, strict=True)):
        image = str(data / "images" / f"{i}.png")
        prompt = Prompt(f"<image>\n{question}", (image,))
        [expected] = answer(*model, tokenizer, [prompt] * 2, Decoding(max_new_tokens=16))[:1]
        fields = {"id": str(i), "question": question, "images": [image], "answers": [reply]}
        marked = {"prediction": expected.text, "correct": expected.text == reply}
        assert row == fields | marked


@pytest.mark.slow
def test_questions_have_any_number_of_images_and_the_tasks_own_answer_length(
    results, data, tiny_models, tokenizer
):
    model = load(tiny_models["sparse"])
    rows = rows_of(results[1] / "counting")
    assert [len(row["images"]) for row in rows] == [0, 1, 2]
    assert [row["answers"] for row in rows] == [answers for _, _, answers in COUNTING]
    for row, (prompt, images, _) in zip(rows, COUNTING, strict=True):
        prompt = Prompt(prompt, tuple(str(data / image) for image in images))
        [expected] = answer(*model, tokenizer, [prompt], Decoding(max_new_tokens=3))
        assert row["prediction"] == expected.text
        assert len(expected.token_ids) <= 3


@pytest.mark.parametrize(("name", "task"), [("easy_vqa", easy_vqa), ("counting", counting)])
def test_scores_are_those_of_the_task(results, name, task):
    scores, out = results[0][name], results[1] / name
    assert json.loads((out / "scores.json").read_text()) == scores
    expected = task.score(rows_of(out))
    assert {k: v for k, v in scores.items() if k != "expert_load"} == expected


def test_shares_of_the_experts_sum_to_one(results):
    for scores in results[0].values():
        assert [row["layer"] for row in scores["expert_load"]] == [0, 2]
        for row in scores["expert_load"]:
            for modality in ("image", "text"):
                assert len(row[modality]) == 4
                np.testing.assert_allclose(sum(row[modality]), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_a_model_is_loaded_once_for_all_tasks(data, tiny_models, tmp_path, monkeypatch):
    calls = []

    def counted_load(folder, *options):
        calls.append(folder)
        return load_with_tokenizer(folder, *options)

    monkeypatch.setattr(runner, "load_with_tokenizer", counted_load)
    runs = [TaskRun(counting.TASK, data, tmp_path / name) for name in ("first", "second")]
    first, second = evaluate(tiny_models["dense"], runs)
    assert first == second
    assert len(calls) == 1


def test_an_interrupted_evaluation_goes_on_with_the_answers_that_it_has(
    data, tiny_models, tmp_path, monkeypatch
):
    run, made = TaskRun(counting.TASK, data, tmp_path / "run"), []

    def counted(*args):
        for number, found in generate(*args):
            made.append(number)
            yield number, found
            if len(made) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(runner, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_models["dense"], [run])
    again = evaluate(tiny_models["dense"], [run])
    assert len(made) == 3  # two before, and the third one
    whole = TaskRun(counting.TASK, data, tmp_path / "whole")
    monkeypatch.setattr(runner, "generate", generate)
    assert again == evaluate(tiny_models["dense"], [whole])
    assert rows_of(run.out) == rows_of(whole.out)


def test_a_finished_evaluation_asks_nothing_again(results, data, tiny_models, monkeypatch):
    scores, out = results[0]["counting"], results[1] / "counting"
    rows, asked = rows_of(out), []

    def none(model, params, tokenizer, prompts, *_):
        asked.extend(prompts)
        return iter(())

    monkeypatch.setattr(runner, "generate", none)
    assert evaluate(tiny_models["sparse"], [TaskRun(counting.TASK, data, out)]) == [scores]
    assert asked == [] and rows_of(out) == rows


def test_a_question_about_another_image_is_another_one(data, tiny_models, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    asked = [
        {"id": "0", "prompt": "<image>\nwhat is it?", "images": [name], "answers": ["red"]}
        for name in ("images/0.png", "images/1.png")
    ]
    (copied / "questions.json").write_text(json.dumps(asked))
    run = TaskRun(counting.TASK, copied, tmp_path / "run")
    evaluate(tiny_models["dense"], [run])
    lines = (run.out / "answers.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == 2


def test_a_question_that_cannot_be_answered_is_said_after_the_others(data, tiny_models, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "images" / "1.png").write_bytes(b"no image")
    run = TaskRun(counting.TASK, copied, tmp_path / "run")
    with pytest.raises(UserError, match=r"^1 of 3 questions cannot be answered, .* '2': .*1\.png"):
        evaluate(tiny_models["dense"], [run])
    assert len((run.out / "answers.jsonl").read_text().splitlines()) == 2
    shutil.copy(data / "images" / "1.png", copied / "images")
    assert evaluate(tiny_models["dense"], [run])[0]["images"] == 3


def test_results_of_another_model_are_not_replaced(data, tiny_models, tmp_path):
    run = TaskRun(counting.TASK, data, tmp_path)
    evaluate(tiny_models["dense"], [run])
    before = (tmp_path / "predictions.jsonl").read_text()
    with pytest.raises(UserError, match=r"expected results of digest .*choose another --out"):
        evaluate(tiny_models["sparse"], [run])
    assert (tmp_path / "predictions.jsonl").read_text() == before


def test_a_column_without_a_score_is_an_error(data, tiny_models, tmp_path):
    task = counting.Task(**vars(counting.TASK) | {"score": lambda rows: {"exact": 1.0}})
    with pytest.raises(ValueError, match=r"expected scores for all columns, got none for \['imag"):
        evaluate(tiny_models["dense"], [TaskRun(task, data, tmp_path)])


def test_a_task_is_found_by_name_and_by_module():
    assert find_task("easy_vqa") is easy_vqa.TASK
    assert find_task("tests.evals.counting") is counting.TASK


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("easyvqa", r"^x: expected 'easy_vqa' or a mod.*, got 'easyvqa' \(did you mean 'easy_vqa'"),
        ("runner", "^x: expected 'easy_vqa' or a module that defines TASK, got 'runner'"),
        ("", "^x: expected 'easy_vqa' or a module that defines TASK, got ''"),
        ("tests.evals.gone", "^x: expected .*, got 'tests.evals.gone'"),
        ("gone.task", "^x: expected .*, got 'gone.task'"),
        ("tests.evals.test_runner", "^x: expected .*, got 'tests.evals.test_runner'"),
    ],
)
def test_an_unknown_task_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name, "x")


def test_a_failing_import_inside_a_task_keeps_its_traceback(tmp_path, monkeypatch):
    package = tmp_path / "own_tasks"
    package.mkdir()
    (package / "broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find_task("own_tasks.broken")


def test_results_in_a_model_folder_are_an_error(data, tiny_models):
    """Another file there would make the model unreadable."""
    folder = tiny_models["dense"]
    message = r"^--out: expected a folder outside of '.*', whose digests\.json lists all"
    with pytest.raises(ValueError, match=message):
        evaluate(folder, [TaskRun(easy_vqa.TASK, data, folder)])
    assert not (folder / "scores.json").exists()


def test_the_command_writes_results_and_prints_scores(data, tiny_models, tmp_path, capsys):
    model, out = str(tiny_models["dense"]), tmp_path / "out"
    args = ["--model", model, "--task", "tests.evals.counting", "--data", str(data)]
    command.main([*args, "--out", str(out)])
    assert json.loads(capsys.readouterr().out) == json.loads((out / "scores.json").read_text())
    assert len(rows_of(out)) == 3
    command.main([*args, "--out", str(out)])  # again, with the answers that it has
    assert json.loads(capsys.readouterr().out) == json.loads((out / "scores.json").read_text())
    args[1] = str(tiny_models["sparse"])
    with pytest.raises(SystemExit, match=r"expected results of digest .*choose another --out"):
        command.main([*args, "--out", str(out)])


def test_the_command_ends_with_one_line_for_an_unknown_task(tiny_models, data, tmp_path):
    args = ["--model", str(tiny_models["dense"]), "--task", "easyvqa", "--data", str(data)]
    with pytest.raises(SystemExit, match=r"^error: --task: expected 'easy_vqa' or"):
        command.main([*args, "--out", str(tmp_path)])
