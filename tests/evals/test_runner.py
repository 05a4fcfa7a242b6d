import json

import numpy as np
import pytest
from PIL import Image

from moddistill.convert.resolve import load
from moddistill.evals import runner
from moddistill.inference.decode import answer
from moddistill.inference.prompts import Prompt

QUESTIONS = [("what colour is it?", "red"), ("is it red?", "yes"), ("is it blue?", "no")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about three pictures, in the format of the easy-VQA folder."""
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
    return folder


@pytest.fixture(scope="module")
def results(data, tiny_models, tmp_path_factory):
    """What the command prints for a sparse model answering in batches of two, and its folder."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "BATCH", 2)
        scores = runner.evaluate(tiny_models["sparse"], "easy_vqa", data, out)
    return scores, out


def test_predictions_are_the_greedy_answers(results, data, tiny_models, tokenizer):
    rows = [
        json.loads(line) for line in (results[1] / "predictions.jsonl").read_text().splitlines()
    ]
    model = load(tiny_models["sparse"])
    for i, (row, (question, reply)) in enumerate(zip(rows, QUESTIONS, strict=True)):
        image = str(data / "images" / f"{i}.png")
        prompt = Prompt(f"<image>\n{question}", (image,))
        [expected] = answer(*model, tokenizer, [prompt] * 2, max_new_tokens=16)[:1]
        given = {"question": question, "image": image, "answer": reply}
        assert row == given | {"prediction": expected.text}


def test_scores_are_those_of_the_benchmark(results):
    scores, out = results
    assert json.loads((out / "scores.json").read_text()) == scores
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    expected = runner.find_benchmark("easy_vqa").score(rows)
    assert {k: v for k, v in scores.items() if k != "expert_load"} == expected
    assert scores["questions"] == 3


def test_shares_of_the_experts_sum_to_one(results):
    load_of_layers = results[0]["expert_load"]
    assert [row["layer"] for row in load_of_layers] == [0, 2]
    for row in load_of_layers:
        for modality in ("image", "text"):
            assert len(row[modality]) == 4
            np.testing.assert_allclose(sum(row[modality]), 1.0, rtol=1e-6)


def test_unknown_benchmark():
    with pytest.raises(ValueError, match=r"'easyvqa' is unknown; .*did you mean 'easy_vqa'"):
        runner.find_benchmark("easyvqa")


def test_results_do_not_go_into_a_model_folder(data, tiny_models):
    """Another file there would make the model unreadable."""
    folder = tiny_models["dense"]
    with pytest.raises(
        ValueError, match=r"--out: expected a folder outside of '.*', whose digests\.json"
    ):
        runner.evaluate(folder, "easy_vqa", data, folder)
    assert not (folder / "scores.json").exists()
