"""Messages and their parts that are not understood."""

import pytest

from tests.data.published import UNUSED, chat, llava, parse


@pytest.mark.parametrize("name", ["weight", "loss"])
def test_an_answer_that_is_not_to_be_trained_on_is_rejected(name):
    """OpenAI and ms-swift. A question with a weight of 0 is as usual (SlimOrca)."""
    for value, is_good in ((1, True), (None, True), (True, True), (0, False), (False, False)):
        record = llava("q", "a")
        record["conversations"][0][name] = 0
        record["conversations"][1][name] = value
        found = parse(record)
        if is_good:
            assert found.turns == (("q", "a"),)
        else:
            place = f"conversations[1].{name}"
            assert found == f"{place}: expected an answer that training may use, got {value}"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("text", "messages[0].content[0]: expected a part of type text or image, got 'text'"),
        ({"type": "video"}, "messages[0].content[0]: expected a part of type text or image, got {"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "messages[0].content[0]: expected a pa"),
        ({"type": "text"}, "messages[0].content[0]: expected a part of type text or image, got {"),
        ({"type": "text", "text": 3}, "messages[0].content[0]: expected a part of type text or im"),
        ({"type": "text", "text": "x", "image": "a.png"}, f"image: {UNUSED}'a.png'"),
        ({"type": "image", "text": "x"}, f"text: {UNUSED}'x'"),
        ({"type": "image", "url": "http://x"}, f"url: {UNUSED}'http://x'"),
        ({"type": "image", "base64": "x"}, f"base64: {UNUSED}'x'"),
        ({"type": "image", "image": "a", "path": "b"}, "number of <image>: expected 2, one per im"),
        ({"type": "image", "image": 7}, "image of a message: expected a name, bytes, or an object"),
        ({"type": "image"}, "number of <image>: expected 0, one per image, got 1"),
    ],
)
def test_a_part_that_is_not_understood_is_rejected(part, reason):
    assert parse({"messages": chat([part], "a")}).startswith(reason)


ALTERNATE = "roles: expected user and assistant in turn, a user first and an assistant last, got "
OBJECT = "expected an object with from and value, or role and content, got "


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "record: expected a JSON object, got None"),
        ("text", "record: expected a JSON object, got 'text'"),
        (["text"], "record: expected a JSON object, got ['text']"),
        ({}, "fields of the record: expected conversations, messages or texts, got []"),
        (
            {"id": 1, "conversations": []},
            "fields of the record: expected conversations, messages or texts, got ['id', 'conver",
        ),
        ({"conversations": "text"}, "conversations: expected a list of messages, got 'text'"),
        ({"messages": {"a": 1}}, "messages: expected a list of messages, got {'a': 1}"),
        ({"texts": "text"}, "texts: expected a list of objects with user and assistant, got 'te"),
        ({"texts": [3]}, "texts[0].user: expected a text, got None"),
        ({"texts": [{"user": "q"}]}, "texts[0].assistant: expected a text, got None"),
        (llava("q"), f"{ALTERNATE}user"),
        (llava("q", "a", "q"), f"{ALTERNATE}user, assistant, user"),
        (llava("a", "q", roles=("gpt", "human")), f"{ALTERNATE}assistant, user"),
        (llava("q", "q", roles=("human", "user")), f"{ALTERNATE}user, user"),
        (
            llava(*"qa" * 5, "q"),
            f"{ALTERNATE}user, assistant, user, assistant, user, assistant, ..",
        ),
        (llava("x", "q", roles=("system", "human")), f"{ALTERNATE}user"),
        (llava("x", roles=("system",)), f"{ALTERNATE}none"),
        (llava("q", "a", roles=("human", "bot")), "conversations[1].from: expected human, gpt, us"),
        (llava("q", "a", roles=("human", ["gpt"])), "conversations[1].from: expected human, gpt, "),
        ({"messages": chat("q")[:1] + [{"role": "tool", "content": "x"}]}, "messages[1].role: exp"),
        ({"conversations": [{"from": "human"}]}, f"conversations[0]: {OBJECT}{{'from': 'human'}}"),
        ({"conversations": ["text"]}, f"conversations[0]: {OBJECT}'text'"),
        ({"messages": [{"role": "user", "value": "q"}]}, f"messages[0]: {OBJECT}{{'role': 'user'"),
        (llava("q", {"a": 1}), "conversations[1].value: expected a text or a list of parts, got {"),
        (llava("q", 3), "conversations[1].value: expected a text or a list of parts, got 3"),
        (llava("q", " \n"), r"answer: expected a text that is not blank, got ' \n'"),
        (llava("<image> q", "a"), "number of <image>: expected 0, one per image, got 1"),
        (llava("q", "a", image="a.png"), "number of <image>: expected 1, one per image, got 0"),
        (llava("q", "a", system=3), "system: expected a text, got 3"),
        (llava("q \ud83d", "a"), "text: expected valid Unicode, got 'utf-8' codec can't encode"),
    ],
)
def test_a_malformed_conversation_is_rejected_with_a_reason(record, reason):
    found = parse(record)
    assert isinstance(found, str)
    assert found.startswith(reason)
