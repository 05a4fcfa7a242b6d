"""`python -m moddistill.generate`: one question, and files of questions."""

import json
import shutil

import pytest

from moddistill import generate
from moddistill.convert.resolve import load
from moddistill.errors import printable
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling

NEW = 6


def command(tiny_models, *args):
    folder = ["--model", str(tiny_models["dense"]), "--max_new_tokens", str(NEW)]
    generate.main([*folder, *args])


def answers(tiny_models, tokenizer, prompts, **settings):
    return answer(*load(tiny_models["dense"]), tokenizer, prompts, decoding(**settings))


def decoding(**settings):
    return Decoding(max_new_tokens=NEW, **settings)


def test_generate_prints_one_json_object(tiny_models, image, tokenizer, capsys):
    flags = ["--json", "--logprobs", "2", "--temperature", "0.7", "--top_k", "9", "--seed", "3"]
    command(tiny_models, "--prompt", "what colour is it?", "--image", image(0), *flags)
    printed = json.loads(capsys.readouterr().out)
    prompt = Prompt("<image>\nwhat colour is it?", (image(0),))
    sampling = Sampling(temperature=0.7, top_k=9)
    [expected] = answers(
        tiny_models, tokenizer, [prompt], sampling=sampling, seed=3, top_logprobs=2
    )
    assert printed["token_ids"] == expected.token_ids
    assert printed["text"] == expected.text and printed["ended"] == expected.ended
    assert [[token, *pair] for token, _, pair in printed["logprobs"]]
    # One image of 2 x 2 patches.
    assert printed["prompt_ids"].count(tokenizer.image_id) == 4


def test_generate_prints_only_the_text(tiny_models, tokenizer, capsys):
    command(tiny_models, "--prompt", "is it red?")
    [expected] = answers(tiny_models, tokenizer, [Prompt("is it red?")])
    assert capsys.readouterr().out == printable(expected.text) + "\n"


def test_control_characters_of_an_answer_are_escaped(tiny_models, capsys, monkeypatch):
    text = "a\x1b[2J\x07\x9b31m\tb\nc\u3000é"
    last = Answer(text, [1], [2], "end", [])
    monkeypatch.setattr(generate, "stream", lambda *_: iter([text[:3], text[3:], last]))
    command(tiny_models, "--prompt", "q")
    assert capsys.readouterr().out == "a\\u001b[2J\\u0007\\u009b31m\tb\nc\u3000é\n"
    command(tiny_models, "--prompt", "q", "--json")
    printed = capsys.readouterr().out
    assert printed.strip().isprintable() or "\u3000" in printed
    assert "\x9b" not in printed
    assert json.loads(printed)["text"] == text


def test_a_broken_image_ends_with_one_line(tiny_models, tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II*\0 and no image")
    args = ["--model", str(tiny_models["dense"]), "--prompt", "q", "--image", f"{tmp_path}/a.tiff"]
    with pytest.raises(SystemExit, match=r"^error: .*a\.tiff: expected a readable image"):
        generate.main(args)


def test_another_number_of_images_than_placeholders_is_an_error(tiny_models, image):
    with pytest.raises(SystemExit, match=r"number of <image>: expected 2, one per image, got 1"):
        command(tiny_models, "--prompt", "<image> what?", "--image", image(0), "--image", image(1))
    with pytest.raises(SystemExit, match=r"number of <image>: expected 0, one per image, got 1"):
        command(tiny_models, "--prompt", "<image> what?")


@pytest.fixture
def files(tmp_path, image):
    """A file of four questions, of which the third has an image that cannot be read."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    questions = [
        {"id": "a", "prompt": "is it red?"},
        {"prompt": "what colour?", "images": [image(0)], "system": "Be brief."},
        {"prompt": "what is it?", "images": ["broken.png"]},
        {"id": 4, "prompt": "and this?", "images": [image(1)], "history": [["hello", "yes"]]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in questions))
    return path, tmp_path / "answers.jsonl"


def rows(path):
    return {row["line"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_questions_of_a_file(tiny_models, tokenizer, files, image):
    questions, out = files
    with pytest.raises(SystemExit, match=r"answers\.jsonl: 1 questions have an `error` in place"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    found = rows(out)
    assert "broken.png: expected a readable image" in found[3]["error"]
    prompts = [
        Prompt("is it red?"),
        Prompt("<image>\nwhat colour?", (image(0),), (), "Be brief."),
        Prompt("<image>\nand this?", (image(1),), (("hello", "yes"),)),
    ]
    expected = answers(tiny_models, tokenizer, prompts)
    assert [found[line]["text"] for line in (1, 2, 4)] == [each.text for each in expected]
    assert [found[line]["id"] for line in (1, 2, 3, 4)] == ["a", None, None, 4]


def test_answers_so_far_are_kept(tiny_models, files, image, monkeypatch):
    """An interrupted file goes on; what had an error is tried again."""
    questions, out = files
    with pytest.raises(SystemExit):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    lines = out.read_text().splitlines(keepends=True)
    kept = next(line for line in lines if '"line": 1' in line).replace('"text": "', '"text": "kept')
    cut = next(line for line in lines if '"line": 2' in line)[:40]
    out.write_text(kept + cut)
    shutil.copy(image(2), questions.parent / "broken.png")
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    assert rows(out).keys() == {1, 2, 3, 4}
    assert rows(out)[1]["text"].startswith("kept")
    monkeypatch.setattr(generate, "load_model", None)  # all is answered
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"images": []}', "line 1: expected an object with a text `prompt`"),
        ('{"prompt": "q", "images": "a.png"}', "images: expected a list of file names"),
        ('{"prompt": "q", "history": ["a"]}', "history: expected a list of pairs"),
        ('{"prompt": "q", "system": 3}', "system: expected a text"),
        ("", "expected at least one question, got none"),
    ],
)
def test_lines_that_are_no_questions(tiny_models, tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        command(tiny_models, "--jsonl", f"{tmp_path}/q.jsonl", "--out", f"{tmp_path}/a.jsonl")


def test_answers_to_other_questions_are_not_continued(tiny_models, files):
    questions, out = files
    out.write_text('{"line": 1, "prompt": "another?", "text": "x"}\n')
    with pytest.raises(SystemExit, match=r"prompt: expected an answer to line 1 of .*, got 'anoth"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))
