"""A conversation in the terminal: questions, commands, and two models side by side."""

import io
import json

import pytest

from moddistill import chat
from moddistill.convert.resolve import load
from moddistill.data.tokenizer import load_tokenizer
from moddistill.errors import UserError
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.loading import Loaded
from moddistill.inference.prompts import Prompt

DECODING = Decoding(max_new_tokens=4)


@pytest.fixture
def conversation(tiny_models):
    """`conversation(images)` with the dense model; other names are those of `tiny_models`."""

    def start(*images):
        def model(name):
            folder = tiny_models[name]
            return Loaded(*load(folder), load_tokenizer(str(folder)))

        return chat.Chat(model, "dense", images, DECODING)

    return start


def said(conversation, line):
    return "".join(conversation.reply(line))


def expected(tiny_models, name, *prompt):
    folder = tiny_models[name]
    tokenizer = load_tokenizer(str(folder))
    [found] = answer(*load(folder), tokenizer, [Prompt(*prompt)], DECODING)
    return found.text


def test_each_answer_depends_on_the_earlier_turns_and_images(tiny_models, conversation, image):
    asked, history, images = conversation(image(0)), (), (image(0),)
    for line, question in [
        ("what colour is it?", "<image>\nwhat colour is it?"),
        ("is it red?", "is it red?"),
    ]:
        reply = expected(tiny_models, "dense", question, images, history)
        assert said(asked, line) == reply + "\n"
        history += ((question, reply),)
    assert said(asked, f"/image {image(1)}") == "1 image(s) for the next question\n"
    images += (image(1),)
    reply = expected(tiny_models, "dense", "<image>\nand this?", images, history)
    assert said(asked, "and this?") == reply + "\n"
    assert said(asked, "/reset") == "a new conversation\n"
    assert said(asked, "is it red?") == expected(tiny_models, "dense", "is it red?") + "\n"


def test_two_models_answer_the_same_questions(tiny_models, conversation):
    asked = conversation()
    said(asked, "/compare sparse")
    both = "".join(
        f"[{name}] {expected(tiny_models, name, 'is it red?')}\n" for name in ("dense", "sparse")
    )
    assert said(asked, "is it red?") == both
    said(asked, "/compare")
    assert "[" not in said(asked, "/reset")


def test_a_conversation_is_saved_as_a_record(tiny_models, conversation, image, tmp_path):
    asked = conversation(image(0))
    reply = said(asked, "what?").strip()
    assert said(asked, f"/save {tmp_path}/a.json") == f"saved to {tmp_path}/a.json\n"
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {
            "id": "dense",
            "image": [image(0)],
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": reply},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image gone.png", "^/image: expected an image file, got 'gone.png'"),
        ("/imagine", "^expected a question or one of /image FILE, .*, got '/imagine'"),
        ("/save", "^expected a question or one of"),
    ],
)
def test_wrong_commands_change_nothing(conversation, line, message):
    asked = conversation()
    first = said(asked, "is it red?")
    with pytest.raises(UserError, match=message):
        said(asked, line)
    said(asked, "/reset")
    assert said(asked, "is it red?") == first


def test_an_image_that_cannot_be_read_is_refused_at_once(
    tiny_models, conversation, image, tmp_path
):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png: expected a readable image"):
        conversation(str(tmp_path / "a.png"))
    asked = conversation(image(0))
    with pytest.raises(UserError, match=r"a\.png: expected a readable image"):
        said(asked, f"/image {tmp_path}/a.png")
    reply = expected(tiny_models, "dense", "<image>\nis it red?", (image(0),))
    assert said(asked, "is it red?") == reply + "\n"


@pytest.mark.parametrize("error", [UserError("prompt: expected fewer tokens"), KeyboardInterrupt()])
def test_both_models_get_a_turn_or_none(conversation, image, tmp_path, monkeypatch, error):
    """A question that the second model does not finish is no turn of the first one either."""
    asked = conversation(image(0))
    said(asked, "/compare sparse")
    answers = chat.stream

    def only_dense(model, *rest):
        if model.config.decoder.moe:
            yield "half of"
            raise error
        yield from answers(model, *rest)

    def turns():
        said(asked, f"/save {tmp_path}/a.json")
        records = json.loads((tmp_path / "a.json").read_text())
        return [(each["image"], [t["value"] for t in each["conversations"]]) for each in records]

    with monkeypatch.context() as patched:
        patched.setattr(chat, "stream", only_dense)
        with pytest.raises(type(error)):
            said(asked, "what?")
    assert turns() == [([], []), ([], [])]
    said(asked, "is it red?")  # the image belongs to this one now
    for images, (question, _) in turns():
        assert images == [image(0)] and question == "<image>\nis it red?"


def test_an_empty_line_ends_the_conversation(tiny_models, image, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n/nothing\n\nnever asked\n"))
    chat.main(["--model", str(tiny_models["dense"]), "--image", image(0), "--max_new_tokens", "2"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and "error: expected a question or one of" in printed


def test_an_interrupt_ends_an_answer_and_then_the_conversation(tiny_models, capsys, monkeypatch):
    def interrupted(*_):
        yield "half of"
        raise KeyboardInterrupt

    lines = iter(["what?", "/reset"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(chat, "stream", interrupted)
    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(SystemExit) as stopped:
        chat.main(["--model", str(tiny_models["dense"])])
    assert stopped.value.code == 130
    assert capsys.readouterr().out == "half of\na new conversation\n"


def test_a_file_that_cannot_be_written_does_not_end_the_conversation(
    tiny_models, tmp_path, capsys, monkeypatch
):
    lines = ["/save /no/such/folder/x.json", f"/save {tmp_path}", "/reset", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main(["--model", str(tiny_models["dense"])])
    assert capsys.readouterr().out == (
        "> error: /save /no/such/folder/x.json: No such file or directory\n"
        f"> error: /save {tmp_path}: Is a directory\n"
        "> a new conversation\n> "
    )


def test_control_characters_of_a_reply_are_escaped(tiny_models, capsys, monkeypatch):
    monkeypatch.setattr(chat, "stream", lambda *_: iter(["a\x1b]0;", "x\x07\nb"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\n"))
    chat.main(["--model", str(tiny_models["dense"])])
    assert capsys.readouterr().out.endswith("a\\u001b]0;x\\u0007\nb\n> ")


def test_a_missing_image_is_an_error(tiny_models, capsys):
    with pytest.raises(SystemExit):
        chat.main(["--model", str(tiny_models["dense"]), "--image", "gone.png"])
    message = "--image: expected an image file, got 'gone.png': no such file"
    assert message in capsys.readouterr().err
