"""Records that are damaged at random: each is one error with a short reason, or a record."""

import copy
import json
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moddistill.config import ColumnsConfig
from moddistill.data import content
from moddistill.data.forms import parse_record
from moddistill.data.records import PreferencePair, Record
from moddistill.errors import UserError
from tests.data.published import chat, llava, parse, read_file

TABLE = ColumnsConfig("question", "answer", "image")
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
ANSWERS = {"chosen": chat("", "Two.")[1:], "rejected": chat("", "Three.")[1:]}
CONVERSATIONS = [
    llava("<image>\nWhat?", "A dog.", "Sure?", "Yes.", id="x", image="a.png", system="Be brief."),
    llava("<image> <image>", "This.", id=7, image=["a.png", {"path": "b.png", "bytes": None}]),
    {"messages": chat(PARTS, [{"type": "text", "text": "A dog."}], "Sure?", "Yes."), "source": "x"},
    {"texts": [{"user": "q", "assistant": "a", "source": "x"}] * 2, "images": [{"path": "a.png"}]},
]
PAIRS = [
    {"question": "How many?", "chosen": "Two.", "rejected": "Three.", "image": {"path": "a.png"}},
    {"prompt": chat(PARTS), **ANSWERS},
    {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b"), "img": ["a.png"]},
    llava("<image>\nWhat?", "Dogs.", "How many?", image="a.png", **ANSWERS),
]
TABLES = [{"question": "q", "answer": ["a", "b"], "image": "a.png", "metadata": {"a": [1, 2]}}]
ALL = (
    [(record, {"kind": "conversation"}) for record in CONVERSATIONS]
    + [(record, {"kind": "preference"}) for record in PAIRS]
    + [(record, {"kind": "conversation", "columns": TABLE}) for record in TABLES]
)
NAMES = sorted(content.OF_RECORD | content.OF_TABLE | content.OF_PART | {"from", "role", "value"})


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


JUNK = [
    None, True, 0, -1, 10**400, 0.5, float("nan"), "", " ", "x", "\0\n\r\x1b[2J\u2028\u202e",
    "<image>", "\ud800", "x" * 10**5, b"\0\xff", [], {}, [None], [[]], {"": {}}, ["x"] * 10**3,
    dict.fromkeys(map(str, range(10**3)), "x"), nested(800), "user", "assistant", "system", "gpt",
    chat("q", "a"), {"type": "image"}, {"type": "video"}, {"bytes": b"", "path": 3}, "\n" * 10**4,
]  # fmt: skip


def places(value):
    """Returns (container, key) of all values in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((value, key))
        found += places(item) if isinstance(item, dict | list) else ()
    return found


def damaged(record, draw):
    """Returns a copy of a record with changes at one to four places."""
    record = copy.deepcopy(record)
    for container, key in draw.choices(places(record), k=draw.choice([1, 1, 2, 4])):
        action, junk = draw.randrange(5), copy.copy(draw.choice(JUNK))
        if isinstance(container, list):
            container[key:] = [[], [junk], container[key:] * 2, [junk, *container[key:]], [{}]][
                action
            ]
        elif action == 0:
            container.pop(key, None)
        elif action == 1:
            container[draw.choice(NAMES)] = container.pop(key, junk)
        elif action == 2:
            container[draw.choice(NAMES)] = junk
        elif action == 3:
            container[key] = draw.choice([[container.get(key)], {"a": container.get(key)}])
        else:
            container[key] = junk
    return record


def check_reason(reason):
    assert len(reason) < 600
    assert reason.isprintable()
    assert "expected" in reason


def test_records_are_valid_before_they_are_damaged():
    for record, options in ALL:
        assert isinstance(parse(record, **options), Record | PreferencePair)


def test_seven_thousand_damaged_records_are_each_one_error():
    draw, rejected, reasons = random.Random(0), 0, set()
    while rejected < 7000:
        record, options = draw.choice(ALL)
        found = parse(damaged(record, draw), **options)
        if isinstance(found, str):
            check_reason(found)
            rejected += 1
            reasons.add(found.partition(":")[0])
    assert len(reasons) > 50  # they are rejected at many places


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, ["x"] * 10**6, dict.fromkeys(map(str, range(10**6)), "x")],
    ids=["text", "list", "object"],
)
def test_a_large_value_is_rejected_without_a_copy(value):
    plain, pair = {"messages": chat("q", "a")}, {"prompt": "q", "chosen": "a", "rejected": "b"}
    records = [(plain | {"video": value}, "conversation"), (pair | {"tools": value}, "preference")]
    records.append(({"messages": [{"role": value, "content": "q"}]}, "conversation"))
    records.append(({"messages": [{"role": "user", "content": [value]}]}, "conversation"))
    if not isinstance(value, str):
        records.append((plain | {"images": value, "id": value}, "conversation"))
        records.append((value, "preference"))
        records.append((pair | {"chosen": value}, "preference"))
    tracemalloc.start()
    for record, kind in records:
        check_reason(parse(record, kind))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # bytes


def test_three_thousand_damaged_lines_are_each_one_error_and_cost_no_neighbour(tmp_path):
    draw, lines = random.Random(1), []
    for _ in range(4000):
        line = bytearray(json.dumps(draw.choice(CONVERSATIONS)).encode())
        for _ in range(draw.choice([1, 1, 3])):
            start = draw.randrange(len(line) + 1)
            end = start + draw.choice([0, 1, 2, 50])
            line[start:end] = draw.choice(
                [b"", b"\xff", b'"', b",", b"{", b"]", b"\\", b"1", b"\0"]
            )
        lines += [bytes(line), json.dumps(llava("q", "a")).encode()]
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read_file(path)
    assert len(found) == 8000
    for line, record in enumerate(found[1::2]):
        assert record == Record(str(path), 2 * line + 2, str(2 * line + 2), (), (("q", "a"),))
    reasons = [record for record in found[::2] if isinstance(record, str)]
    assert len(reasons) > 3000
    for reason in reasons:
        check_reason(reason)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*NAMES, "user", "assistant"]), inner, max_size=6)
    ),
)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(VALUES, st.sampled_from(ALL))
def test_any_value_is_a_record_or_an_error(value, valid):
    _, options = valid
    try:
        assert parse_record(value, file="f", line=1, image_root="", **options)
    except UserError as error:
        check_reason(str(error))
