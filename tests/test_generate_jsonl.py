"""`python -m moddistill.generate` with a file of questions."""

import json
import shutil

import pytest

from moddistill import generate
from moddistill.convert.resolve import load
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt

NEW = 6


def command(tiny_models, *args):
    folder = ["--model", str(tiny_models["dense"]), "--max_new_tokens", str(NEW)]
    generate.main([*folder, *args])


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
    return {row["line"]: row for row in map(json.loads, path.read_bytes().splitlines())}


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
    decoding = Decoding(max_new_tokens=NEW)
    expected = answer(*load(tiny_models["dense"]), tokenizer, prompts, decoding)
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
        (
            '{"prompt": "q", "image": "a.png"}',
            "line 1: expected the keys 'prompt', 'images', 'id', 'system', 'history', "
            r"got 'image' \(did you mean 'images'\?\)",
        ),
        ("", "expected at least one question, got none"),
    ],
)
def test_lines_that_are_no_questions(tiny_models, tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        command(tiny_models, "--jsonl", f"{tmp_path}/q.jsonl", "--out", f"{tmp_path}/a.jsonl")


def test_half_of_a_surrogate_pair_is_an_error_of_its_question(tiny_models, tmp_path):
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(json.dumps({"prompt": "\ud800"}) + "\n" + json.dumps({"prompt": "q"}))
    with pytest.raises(SystemExit, match=r"a\.jsonl: 1 questions have an `error`"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    assert rows(out)[1]["error"].startswith("text: expected valid Unicode, got ")
    assert "text" in rows(out)[2]


def test_a_question_ends_at_a_line_feed_only(tiny_models, tmp_path):
    """Other separators, such as U+2028, are text of a question."""
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    text = "is it\u2028red?\x85"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    questions.write_bytes(f"{line}\r\n{line}".encode())
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    assert {line: row["prompt"] for line, row in rows(out).items()} == {1: text, 2: text}


def test_a_question_in_another_encoding_is_an_error(tiny_models, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'{"prompt": "q"}\n{"prompt": "gr\xfcn?"}\n')
    with pytest.raises(SystemExit, match=r"q\.jsonl, line 2: expected JSON, .* byte 0xfc"):
        command(tiny_models, "--jsonl", f"{tmp_path}/q.jsonl", "--out", f"{tmp_path}/a.jsonl")


def test_a_folder_that_is_missing_is_an_error_with_the_name_that_was_given(tiny_models, files):
    with pytest.raises(SystemExit, match=r"^error: /no/dir/a\.jsonl: No such file or directory$"):
        command(tiny_models, "--jsonl", str(files[0]), "--out", "/no/dir/a.jsonl")


@pytest.fixture
def answered(tiny_models, tmp_path):
    """A file of two questions, and that of their answers."""
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text('{"prompt": "is it red?"}\n{"prompt": "and now?"}\n')
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    return questions, out


def test_an_answer_that_is_cut_inside_a_character_is_given_again(tiny_models, answered):
    questions, out = answered
    first, second, _ = out.read_bytes().split(b"\n")
    out.write_bytes(first + b"\n" + second[:20] + "\u00fc".encode()[:1])
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    assert out.read_bytes() == first + b"\n" + second + b"\n"


def test_a_damaged_answer_is_an_error_that_says_what_to_do(tiny_models, answered):
    questions, out = answered
    second = out.read_bytes().split(b"\n")[1]
    for damaged in (b'{"line": 1, "pro', b'{"line": 1, "prompt": "\xc3"}'):
        out.write_bytes(damaged + b"\n" + second + b"\n")
        message = r"a\.jsonl, line 1: .*; delete this line, and its question is answered again"
        with pytest.raises(SystemExit, match=message):
            command(tiny_models, "--jsonl", str(questions), "--out", str(out))
        assert out.read_bytes().startswith(damaged + b"\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.7"], r"temperature: expected 0\.7 as now, or another --out, got"),
        (["--max_new_tokens", "7"], "max_new_tokens: expected 7 as now, .*, got 6"),
        (["--stop", "x"], r"stop: expected \['x'\] as now, .*, got \[\]"),
        (["--seed", "1"], "seed: expected 1 as now, .*, got 0"),
        (["--dtype", "bfloat16"], "dtype: expected 'bfloat16' as now, .*, got 'float32'"),
    ],
)
def test_answers_with_other_settings_are_not_continued(tiny_models, answered, flags, message):
    questions, out = answered
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=rf"a\.jsonl, line 1: {message}"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out), *flags)
    assert out.read_bytes() == before


def test_answers_of_another_model_are_not_continued(tiny_models, answered, tmp_path):
    questions, out = answered
    flags = ["--jsonl", str(questions), "--out", str(out), "--model"]
    with pytest.raises(SystemExit, match=r"line 1: model: expected '.*sparse' as now, .*dense'"):
        command(tiny_models, *flags, str(tiny_models["sparse"]))
    student = shutil.copytree(tiny_models["dense"], tmp_path / "student")
    out.write_text(out.read_text().replace(str(tiny_models["dense"]), str(student)))
    shutil.rmtree(student)
    shutil.copytree(tiny_models["sparse"], student)  # another one in its place
    with pytest.raises(SystemExit, match=r"line 1: weights: expected '\w+' as now, .*, got '\w+'"):
        command(tiny_models, *flags, str(student))


def test_a_folder_that_is_no_model_is_an_error(tiny_models, answered, tmp_path):
    questions, out = answered
    with pytest.raises(SystemExit, match=r"error: expected a model folder, .* without model\.json"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out), "--model", str(tmp_path))


def test_a_model_may_be_moved(tiny_models, answered, tmp_path, monkeypatch):
    questions, out = answered
    copied = shutil.copytree(tiny_models["dense"], tmp_path / "copied")
    monkeypatch.setattr(generate, "load_model", None)  # all is answered
    flags = ["--jsonl", str(questions), "--out", str(out), "--model", str(copied)]
    command(tiny_models, *flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["b.png"]}, r"images: expected \['b\.png'\] as now, .*, got \['a\.png'\]"),
        ({"system": "Be long."}, "system: expected 'Be long.' as now, .*, got None"),
        ({"history": [["a", "b"]]}, r"history: expected \[\['a', 'b'\]\] as now, .*, got \[\]"),
    ],
)
def test_answers_to_changed_questions_are_not_continued(
    tiny_models, image, tmp_path, change, message
):
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    shutil.copy(image(0), tmp_path / "a.png")
    asked = {"prompt": "<image> is it red?", "images": ["a.png"]}
    questions.write_text(json.dumps(asked) + "\n")
    command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    questions.write_text(json.dumps(asked | change) + "\n")
    with pytest.raises(SystemExit, match=rf"a\.jsonl, line 1: {message}"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"line": 1, "prompt": "another?", "text": "x"}', "prompt: expected 'is it red.' as"),
        ('{"line": 9, "prompt": "what?"}', "expected an answer to a line of .*, got {'line': 9"),
        ('{"line": [1]}', "expected an answer to a line of .*, or another --out, got {'line': "),
        ("null", "expected an answer to a line of .*, or another --out, got None"),
    ],
)
def test_rows_of_other_files_are_not_continued(tiny_models, files, row, message):
    questions, out = files
    out.write_text(row + "\n")
    with pytest.raises(SystemExit, match=rf"answers\.jsonl, line 1: {message}"):
        command(tiny_models, "--jsonl", str(questions), "--out", str(out))
    assert out.read_text() == row + "\n"
