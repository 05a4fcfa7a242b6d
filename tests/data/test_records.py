import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moddistill.data.records import (
    PreferencePair,
    Quarantine,
    Record,
    Rejected,
    read_conversations,
    read_preferences,
)

GOOD = {
    "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
}


def talk(*values, **fields):
    roles = ("human", "gpt")
    messages = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": messages, **fields}


def test_a_conversation_keeps_its_turns_images_and_place(data_file, picture, tmp_path):
    first, second = picture("a.png"), picture("b.png")
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
        ({"conversations": []}, "conversations is a list of messages, not []"),
        ({}, "conversations is a list of messages, not None"),
        ("text", "a record is an object, not 'text'"),
        (talk("q"), "ends with human; it must end with gpt"),
        ({"conversations": GOOD["conversations"][::-1]}, "message 1 is from 'gpt', not 'human'"),
        ({"conversations": GOOD["conversations"][:1] * 2}, "message 2 is from 'human', not 'gpt'"),
        (
            {"conversations": [{"from": "system", "value": "x"}, *GOOD["conversations"]]},
            "message 1 is from 'system'",
        ),
        ({"conversations": [{"from": "human"}]}, "message 1 has no text under value"),
        (talk("q", " \n"), "an answer is empty"),
        (talk("q", "see <image>"), "<image> stands in an answer"),
        (talk("<image> q", "a"), "<image> is written 1 times, but there are 0 images"),
        (talk("q", "a", image="a.png"), "<image> is written 0 times, but there are 1 images"),
        (
            talk("<image><image>", "a", image=["a.png", "a.png", "a.png"]),
            "<image> is written 2 times, but there are 3 images",
        ),
        (talk("<image>", "a", image="gone.png"), "gone.png is missing"),
        (talk("<image>", "a", image=7), "image is a name or a list of names, not 7"),
        (talk("q \ud83d", "a"), "not valid Unicode"),
    ],
)
def test_a_record_that_breaks_the_format_is_rejected_with_its_reason(
    record, reason, data_file, picture, tmp_path
):
    picture("a.png")
    path = data_file([GOOD, record])
    records, rejected = read_conversations(path, str(tmp_path))
    assert [item.line for item in records] == [1]
    assert [(item.file, item.line) for item in rejected] == [(path, 2)]
    assert reason in rejected[0].reason


def test_a_broken_line_of_jsonl_is_rejected_and_lines_are_counted_as_in_the_file(data_file):
    path = data_file([GOOD, "", '{"conversations": [', GOOD], "data.jsonl")
    records, rejected = read_conversations(path, "")
    assert [item.line for item in records] == [1, 4]
    assert rejected[0].line == 3
    assert rejected[0].reason.startswith("not JSON: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("[" * 200_000 + "]" * 200_000, "not JSON: maximum recursion depth exceeded"),
        ('{"conversations": ' + "[" * 900 + "]" * 900 + "}", "maximum recursion|no text under val"),
    ],
    ids=["long number", "deep", "less deep"],
)
def test_json_beyond_the_limits_of_the_parser_is_rejected_with_its_line(line, reason, data_file):
    path = data_file([GOOD, line], "data.jsonl")
    records, [rejected] = read_conversations(path, "")
    assert ([item.line for item in records], rejected.line) == ([1], 2)
    assert re.search(reason, rejected.reason)
    Path(path).with_suffix(".json").write_text(f"[{line}]")
    with pytest.raises(ValueError, match=r"data\.json: (not JSON: |all 1 records are rejected)"):
        read_conversations(path.removesuffix("l"), "")


def test_line_separators_inside_a_jsonl_string_do_not_end_the_line(data_file):
    path = data_file([json.dumps(talk("a\u2028b", "c"), ensure_ascii=False)], "data.jsonl")
    assert read_conversations(path, "")[0][0].turns == (("a\u2028b", "c"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "not JSON: "),
        ('{"a": 1}', "a JSON list of records is wanted, not {'a': 1}"),
        ("[]", "there are no records in this file"),
        ('["x", 3]', "all 2 records are rejected (1: a record is an object, not 'x'; 2: "),
    ],
)
def test_a_file_without_usable_records_is_an_error_that_names_it(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_conversations(str(path), "")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_missing_data_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json': no such data file"):
        read_conversations(str(tmp_path / "nowhere.json"), "")


@pytest.mark.parametrize("root", ["", "/no/such/folder"])
def test_a_missing_image_folder_is_an_error_and_not_one_rejection_a_record(root, data_file):
    path = data_file([GOOD, talk("<image>", "a", image="a.png")])
    with pytest.raises(ValueError, match=f"data.json, record 2: .* {root!r} is no folder"):
        read_conversations(path, root)


def test_preferences_have_a_history_a_question_and_two_answers(data_file, picture, tmp_path):
    image = picture("a.png")
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
        (talk("q", "a", chosen="x", rejected="y"), "the conversation ends with gpt"),
        ({"chosen": "x", "rejected": "y"}, "has conversations, or question as a text"),
        (talk("q", chosen="x", rejected="x"), "chosen and rejected are the same"),
        (talk("q", chosen="x"), "rejected is a text, not None"),
        (talk("q", chosen="x", rejected=" "), "an answer is empty"),
        (talk("q", chosen="<image>", rejected="y"), "<image> stands in an answer"),
        (talk("<image>", chosen="x", rejected="y"), "written 1 times, but there are 0 images"),
        (talk("q", chosen="x", rejected="\udc00"), "not valid Unicode"),
    ],
)
def test_a_pair_that_breaks_the_format_is_rejected_with_its_reason(record, reason, data_file):
    path = data_file([talk("q", chosen="x", rejected="y"), record])
    pairs, rejected = read_preferences(path, "")
    assert len(pairs) == 1
    assert reason in rejected[0].reason


def test_quarantine_holds_each_record_once_over_runs(tmp_path):
    path = str(tmp_path / "run" / "quarantine.jsonl")
    first, second = Rejected("f", 1, "坏 \ud83d"), Rejected("f", 2, "bad")
    assert Quarantine(path).count == 0
    quarantine = Quarantine(path)
    quarantine.add([first])
    quarantine.add([first, second])
    Quarantine(path).add([second, Rejected("g", 2, "bad")])
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [("f", 1), ("f", 2), ("g", 2)]
    assert lines[0]["reason"] == "坏 \ud83d"
    assert quarantine.count == 3


def test_processes_can_share_a_quarantine(tmp_path):
    path = str(tmp_path / "quarantine.jsonl")
    code = (
        "import sys; from moddistill.data.records import *\n"
        "for line in range(200):\n"
        "    Quarantine(sys.argv[1]).add([Rejected(sys.argv[2], line, 'x' * 200)])"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, path, name], env=environment)
        for name in ("a", "b")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(Path(path).read_text().splitlines()) == 400
    assert Quarantine(path).count == 400


def test_a_line_that_another_process_is_still_writing_is_not_counted(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"file": "f", "line": 1, "reason": "a\u2028b"}\n{"file": "f", "li')
    assert Quarantine(str(path)).count == 1
