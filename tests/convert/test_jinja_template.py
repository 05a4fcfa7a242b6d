"""Exported Jinja templates render the text of training, with Qwen's real tokenizer."""

import numpy as np
import pytest
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer

from moddistill.config import TEMPLATES
from moddistill.convert.jinja_template import chat_template, detect_template
from moddistill.data.chat_template import prompt, render
from moddistill.data.examples import encode_sides
from moddistill.data.records import Record
from moddistill.data.tokenizer import load_tokenizer
from moddistill.errors import UserError
from tests.data.qwen_ranks import oracle, write_tokenizer_json

CONVERSATIONS = {
    "English": [("<image>\nWhat is on the table?", "Two cups, and a book."), ("How many?", "Two.")],
    "Chinese": [("<image>\n桌子上有什么?请详细描述。", "两个杯子和一本书。"), ("多少?", "两个。")],
    "without an image": [("你好, who are you?", "I'm a model。")],
    "code and spaces": [("  Fix this:\n\n\tx = 1;  ", "```\nx = 2\n```"), ("thanks!", " Welcome ")],
}


# As published with Qwen2-Instruct (Apache-2.0).
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_tokenizer_json(folder)
    return load_tokenizer(str(folder))


def messages(turns):
    """Returns a conversation for chat templates, with images as separate items."""
    found = []
    for question, answer in turns:
        text = question.removeprefix("<image>\n")
        content = [{"type": "image"}] * (text != question) + [{"type": "text", "text": text}]
        found += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return found


def load_in_transformers(tokenizer, template, tmp_path):
    tokenizer.save(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = chat_template(template)
    return loaded


def ids_of(tokenizer, pieces):
    ids = []
    for piece in pieces:
        ids += [tokenizer.special(piece.text)] if piece.special else tokenizer.encode(piece.text)
    return ids


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_chat_template_renders_the_training_text(template, turns, qwen, tmp_path):
    loaded = load_in_transformers(qwen, template, tmp_path)
    text = loaded.apply_chat_template(messages(turns), tokenize=False)
    assert text == "".join(piece.text for piece in render(template, turns))
    assert loaded(text).input_ids == ids_of(qwen, render(template, turns))


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_generation_prompt_equals_that_of_generate(template, turns, qwen, tmp_path):
    *history, (question, answer) = turns
    loaded = load_in_transformers(qwen, template, tmp_path)
    asked = messages([*history, (question, answer)])[:-1]
    ids = loaded.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == ids_of(qwen, prompt(template, history, question))


@pytest.mark.parametrize("name", ["without an image", "code and spaces"])
def test_chatml_equals_the_published_template_of_qwen(name, qwen, tmp_path):
    turns = CONVERSATIONS[name]
    loaded = load_in_transformers(qwen, "chatml", tmp_path)
    chat = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    published = loaded.apply_chat_template(chat, tokenize=False, chat_template=QWEN2)
    assert published == "".join(piece.text for piece in render("chatml", turns))
    asked = loaded.apply_chat_template(
        chat[:-1], tokenize=False, chat_template=QWEN2, add_generation_prompt=True
    )
    assert asked == "".join(piece.text for piece in prompt("chatml", turns[:-1], turns[-1][0]))


def test_plain_template_renders_image_and_caption(qwen, tmp_path):
    loaded = load_in_transformers(qwen, "plain", tmp_path)
    turns = [("<image>\nignored", "a red cup")]
    text = loaded.apply_chat_template(messages(turns), tokenize=False)
    assert text == "".join(piece.text for piece in render("plain", turns)) == "<image>a red cup\n"


def test_system_message_replaces_the_default_one(qwen, tmp_path):
    loaded = load_in_transformers(qwen, "chatml", tmp_path)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["English", "Chinese"])
@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_label_mask_covers_answers_and_their_ends(template, name, qwen):
    """The supervised ids, decoded by the original tokenizer, are exactly the answers."""
    turns = tuple(turn for turn in CONVERSATIONS[name])
    turns = ((turns[0][0].removeprefix("<image>\n"), turns[0][1]), *turns[1:])
    [sample] = encode_sides(Record("f", 1, "1", (), turns), template, qwen, 0)
    runs = np.split(sample.tokens, np.flatnonzero(np.diff(sample.loss_mask)) + 1)
    starts_supervised = bool(sample.loss_mask[0])
    supervised = runs[0 if starts_supervised else 1 :: 2]
    end = {"chatml": "<|im_end|>", "vicuna": "<|endoftext|>"}[template]
    space = {"chatml": "", "vicuna": " "}[template]
    decoded = [oracle().decode(run.tolist()) for run in supervised]
    assert decoded == [f"{space}{answer}{end}" for _, answer in turns]


def test_unknown_template_is_an_error():
    with pytest.raises(ValueError, match=r"template: expected one of .*, got 'chatml2'"):
        chat_template("chatml2")
    assert set(TEMPLATES) == {"chatml", "vicuna", "plain"}


def test_template_without_chatml_tokens_logs_a_warning(tmp_path, caplog):
    (tmp_path / "chat_template.jinja").write_text("USER: {{ messages }} ASSISTANT:")
    assert detect_template(tmp_path) == "chatml"
    assert "imported with the template chatml, unless --template names another" in caplog.text


def test_template_that_is_not_unicode_is_refused(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "\\ud800"}')
    with pytest.raises(UserError, match=r"\.json: expected a chat_template in Unicode"):
        detect_template(tmp_path)


ATTACK = (
    "<|im_start|>{{ cycler.__init__.__globals__.os.system('touch MARK') }}"
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
)


@pytest.mark.slow
def test_code_in_the_template_of_a_tokenizer_folder_is_never_run(qwen, tmp_path):
    """Templates are compared and copied as text; only `transformers` renders, in its sandbox."""
    attack = ATTACK.replace("MARK", str(tmp_path / "ran"))
    qwen.save(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(attack)
    assert detect_template(tmp_path) == "chatml"
    tokenizer = load_tokenizer(str(tmp_path))
    question = [piece.text for piece in prompt("chatml", [], attack)]
    assert attack in "".join(question)
    assert attack in tokenizer.decode(ids_of(tokenizer, prompt("chatml", [], attack)), False)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(SecurityError):
        loaded.apply_chat_template(messages([("hi", "you")]), tokenize=False)
    assert not (tmp_path / "ran").exists()
