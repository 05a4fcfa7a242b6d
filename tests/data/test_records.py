import json
import re
from pathlib import Path

import pytest

from moddistill.data.records import PreferencePair, Record, read_conversations, read_preferences

GOOD = {
    "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
}


def talk(*values, **fields):
    roles = ("human", "gpt")
    messages = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": messages, **fields}


def test_record_has_turns_images_file_and_line(data_file, image_file, tmp_path):
    first, second = image_file("a.png"), image_file("b.png")
    path = data_file(
        [
            talk("<image>\nWhat?", "A dog.", "Sure?", "Yes.", id="x", image="a.png"),
            talk("<image> or <image>?", "The first.", image=["a.png", "b.png"]),
            talk("Hello", "Good day."),
        ]
    )
    records, rejected = read_conversations(path, str(tmp_path))
    assert rejected == []
    turns = (("<image>\nWhat?", "A dog."), ("Sure?", "Yes."))
    assert records == [
        Record(path, 1, "x", (first,), turns),
        Record(path, 2, "2", (first, second), (("<image> or <image>?", "The first."),)),
        Record(path, 3, "3", (), (("Hello", "Good day."),)),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": []}, "conversations: expected a list of messages, got []"),
        ({}, "conversations: expected a list of messages, got None"),
        ("text", "record: expected a JSON object, got 'text'"),
        (talk("q"), "conversations[-1].from: expected 'gpt', got 'human'"),
        (
            {"conversations": GOOD["conversations"][::-1]},
            "conversations[0].from: expected 'human', got 'gpt'",
        ),
        (
            {"conversations": GOOD["conversations"][:1] * 2},
            "conversations[1].from: expected 'gpt', got 'human'",
        ),
        (
            {"conversations": [{"from": "system", "value": "x"}, *GOOD["conversations"]]},
            "conversations[0].from: expected 'human', got 'system'",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "conversations[0]: expected an object whose value is a text, got {'from': 'human'}",
        ),
        (talk("q", " \n"), r"answer: expected a text that is not blank, got ' \n'"),
        (
            talk("q", "see <image>"),
            "answer: expected no <image>, which only questions contain, got 'see <i",
        ),
        (talk("<image> q", "a"), "number of <image>: expected 0, one per image, got 1"),
        (talk("q", "a", image="a.png"), "number of <image>: expected 1, one per image, got 0"),
        (
            talk("<image><image>", "a", image=["a.png", "a.png", "a.png"]),
            "number of <image>: expected 3, one per image, got 2",
        ),
        (talk("<image>", "a", image="gone.png"), "', got 'gone.png'"),
        (talk("<image>", "a", image=7), "image: expected a name or a list of names, got 7"),
        (talk("q \ud83d", "a"), "text: expected valid Unicode, got 'utf-8' codec can't encode"),
    ],
)
def test_malformed_record_is_rejected_with_a_reason(
    record, reason, data_file, image_file, tmp_path
):
    image_file("a.png")
    path = data_file([GOOD, record])
    records, rejected = read_conversations(path, str(tmp_path))
    assert [item.line for item in records] == [1]
    assert [(item.file, item.line) for item in rejected] == [(path, 2)]
    assert reason in rejected[0].reason


def test_malformed_jsonl_line_is_rejected_with_its_line_number(data_file):
    path = data_file([GOOD, "", '{"conversations": [', GOOD], "data.jsonl")
    records, rejected = read_conversations(path, "")
    assert [item.line for item in records] == [1, 4]
    assert rejected[0].line == 3
    assert rejected[0].reason.startswith("expected JSON, got text that does not parse: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"id": ' + "1" * 5000 + "}",
            "expected JSON, got text that does not parse: Exceeds the limit",
        ),
        (
            "[" * 200_000 + "]" * 200_000,
            "expected JSON, got text that does not parse: maximum recursion depth exceeded",
        ),
        (
            '{"conversations": ' + "[" * 900 + "]" * 900 + "}",
            r"maximum recursion|conversations: .*got \[\[|conversations\[0\]: exp",
        ),
    ],
    ids=["long number", "deep", "less deep"],
)
def test_json_beyond_the_limits_of_the_parser_is_rejected_with_its_line_number(
    line, reason, data_file
):
    path = data_file([GOOD, line], "data.jsonl")
    records, [rejected] = read_conversations(path, "")
    assert ([item.line for item in records], rejected.line) == ([1], 2)
    assert re.search(reason, rejected.reason)
    Path(path).with_suffix(".json").write_text(f"[{line}]")
    with pytest.raises(
        ValueError, match=r"data\.json: (expected JSON, got |expected a valid record, got 1)"
    ):
        read_conversations(path.removesuffix("l"), "")


def test_unicode_line_separators_do_not_end_a_jsonl_line(data_file):
    path = data_file([json.dumps(talk("a\u2028b", "c"), ensure_ascii=False)], "data.jsonl")
    assert read_conversations(path, "")[0][0].turns == (("a\u2028b", "c"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "expected JSON, got text that does not parse: "),
        ('{"a": 1}', "expected a JSON list of records, got {'a': 1}"),
        ("[]", "expected at least one record, got none"),
        (
            '["x", 3]',
            "expected a valid record, got 2 rejected ones (1: record: expected a JSON object, ",
        ),
    ],
)
def test_file_without_usable_records_is_an_error_that_names_it(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_conversations(str(path), "")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_missing_data_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: expected a \.json or .*, got none"):
        read_conversations(str(tmp_path / "nowhere.json"), "")


@pytest.mark.parametrize("root", ["", "/no/such/folder"])
def test_missing_image_folder_is_one_error_instead_of_rejections(root, data_file):
    path = data_file([GOOD, talk("<image>", "a", image="a.png")])
    with pytest.raises(
        ValueError, match=f"data.json: expected an existing f.* record 2 .* got {root!r}"
    ):
        read_conversations(path, root)


def test_preference_pair_has_history_question_and_two_answers(data_file, image_file, tmp_path):
    image = image_file("a.png")
    answers = {"chosen": "Two.", "rejected": "Three."}
    path = data_file(
        [
            talk("<image>\nWhat?", "Dogs.", "How many?", image="a.png", **answers),
            {"question": "How many?", "image": "a.png", **answers},
            {"question": "1 + 1?", **answers},
        ]
    )
    pairs, rejected = read_preferences(path, str(tmp_path))
    assert rejected == []
    history = (("<image>\nWhat?", "Dogs."),)
    assert pairs == [
        PreferencePair(path, 1, "1", (image,), history, "How many?", "Two.", "Three."),
        PreferencePair(path, 2, "2", (image,), (), "<image>\nHow many?", "Two.", "Three."),
        PreferencePair(path, 3, "3", (), (), "1 + 1?", "Two.", "Three."),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            talk("q", "a", chosen="x", rejected="y"),
            "conversations[-1].from: expected 'human', before chosen and rejected, got 'gpt'",
        ),
        (
            {"chosen": "x", "rejected": "y"},
            "question: expected a text, in a record without conversations, got None",
        ),
        (
            talk("q", chosen="x", rejected="x"),
            "rejected: expected another text than chosen, got 'x'",
        ),
        (talk("q", chosen="x"), "rejected: expected a text, got None"),
        (talk("q", chosen="x", rejected=" "), "answer: expected a text that is not blank, got ' '"),
        (
            talk("q", chosen="<image>", rejected="y"),
            "answer: expected no <image>, which only questions contain, got '<image>'",
        ),
        (
            talk("<image>", chosen="x", rejected="y"),
            "number of <image>: expected 0, one per image, got 1",
        ),
        (
            talk("q", chosen="x", rejected="\udc00"),
            "text: expected valid Unicode, got 'utf-8' codec",
        ),
    ],
)
def test_malformed_preference_pair_is_rejected_with_a_reason(record, reason, data_file):
    path = data_file([talk("q", chosen="x", rejected="y"), record])
    pairs, rejected = read_preferences(path, "")
    assert len(pairs) == 1
    assert reason in rejected[0].reason
