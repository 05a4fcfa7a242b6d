import io

import pytest

from moddistill import chat
from moddistill.convert.resolve import load
from moddistill.data.tokenizer import load_tokenizer
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt


@pytest.fixture
def image(tiny_config):
    [source] = tiny_config("sft").data.sources.values()
    return f"{source.images}/0.png"


def test_each_answer_depends_on_the_earlier_turns(tiny_models, image):
    folder = tiny_models["dense"]
    model, params = load(folder)
    tokenizer = load_tokenizer(str(folder))
    asked = iter(["what colour is it?", "is it red?"])
    first, second = chat.converse(model, params, tokenizer, asked, [image], 4)
    question = "<image>\nwhat colour is it?"
    prompts = [
        Prompt(question, (image,)),
        Prompt("is it red?", (image,), ((question, first),)),
    ]
    for reply, prompt in zip((first, second), prompts, strict=True):
        [expected] = answer(model, params, tokenizer, [prompt], Decoding(max_new_tokens=4))
        assert reply == expected.text


def test_an_empty_line_ends_the_conversation(tiny_models, image, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\nnever asked\n"))
    chat.main(["--model", str(tiny_models["dense"]), "--image", image, "--max_new_tokens", "2"])
    assert capsys.readouterr().out.count("\n") == 1


def test_control_characters_of_a_reply_are_escaped(tiny_models, capsys, monkeypatch):
    monkeypatch.setattr(chat, "answer", lambda *_, **__: [Answer("a\x1b]0;x\x07\nb", [], [])])
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\n"))
    chat.main(["--model", str(tiny_models["dense"])])
    assert capsys.readouterr().out.endswith("a\\u001b]0;x\\u0007\nb\n> ")


def test_a_missing_image_is_an_error(tiny_models, capsys):
    with pytest.raises(SystemExit):
        chat.main(["--model", str(tiny_models["dense"]), "--image", "gone.png"])
    assert (
        "--image: expected an image file, got 'gone.png': no such file" in capsys.readouterr().err
    )
