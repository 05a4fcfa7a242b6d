"""`python -m moddistill.generate` with one question."""

import json

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
    decoding = Decoding(max_new_tokens=NEW, **settings)
    return answer(*load(tiny_models["dense"]), tokenizer, prompts, decoding)


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "q", "--logprobs", "3"], "--logprobs: expected --json or --jsonl with it"),
        (
            ["--jsonl", "q.jsonl", "--out", "./q.jsonl"],
            "--out: expected another file than --jsonl, got 'q.jsonl' for both",
        ),
        (["--jsonl", "q.jsonl", "--out", "a.jsonl", "--json"], "--json: expected --prompt with it"),
    ],
)
def test_flags_without_effect_are_refused(tiny_models, capsys, flags, message):
    with pytest.raises(SystemExit):
        command(tiny_models, *flags)
    assert f"error: {message}" in capsys.readouterr().err
