"""`python -m moddistill.generate`: one question, and files of questions."""

import json

import pytest

from moddistill import generate
from moddistill.convert.resolve import load
from moddistill.errors import printable
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt

NEW = 6


def command(tiny_models, *args):
    folder = ["--model", str(tiny_models["dense"]), "--max_new_tokens", str(NEW)]
    generate.main([*folder, *args])


def test_generate_prints_one_json_object(tiny_models, image, prompts, tokenizer, capsys):
    command(tiny_models, "--prompt", "what colour is it?", "--image", image(0), "--json")
    printed = json.loads(capsys.readouterr().out)
    [expected] = answer(
        *load(tiny_models["dense"]), tokenizer, prompts[:1], Decoding(max_new_tokens=NEW)
    )
    assert printed == {
        "text": expected.text, "token_ids": expected.token_ids, "prompt_ids": expected.prompt_ids
    }  # fmt: skip
    # One image of 2 x 2 patches.
    assert printed["prompt_ids"].count(tokenizer.image_id) == 4
    assert tokenizer.decode(printed["token_ids"]).strip() == printed["text"]


def test_generate_prints_only_the_text(tiny_models, tokenizer, capsys):
    command(tiny_models, "--prompt", "is it red?")
    printed = capsys.readouterr().out
    [expected] = answer(
        *load(tiny_models["dense"]), tokenizer, [Prompt("is it red?")], Decoding(max_new_tokens=NEW)
    )
    assert printed == printable(expected.text) + "\n"


def test_control_characters_of_an_answer_are_escaped(tiny_models, capsys, monkeypatch):
    text = "a\x1b[2J\x07\x9b31m\tb\nc\u3000é"
    monkeypatch.setattr(generate, "answer", lambda *_, **__: [Answer(text, [1], [2])])
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
