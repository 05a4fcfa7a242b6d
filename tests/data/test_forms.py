"""Conversations in the forms in which they are published, in files."""

import pyarrow as pa
import pytest

from moddistill.config import ColumnsConfig
from moddistill.data.image_files import EmbeddedImage, ImageFile
from tests.data.published import (
    FILE,
    HF_IMAGE,
    PNG,
    UNUSED,
    chat,
    content,
    llava,
    parse,
)

# LLaVA: LLaVA-Instruct, ShareGPT4V, ALLaVA, LLaVA-OneVision, Cambrian, M4-Instruct, MobileVLM, ...


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava(read_records, suffix):
    records = [
        llava("<image>\nWhat?", "A dog.", "Sure?", "Yes.", id="x", image="coco/a.png"),
        llava("<image> or <image>?", "This.", id=7, image=["a.png", "b.png"]),
        llava("Hello", "Good day.", roles=("user", "assistant"), model=""),
    ]
    first, second, third = read_records(records, suffix)
    assert (first.id, first.line, second.id, second.line, third.id) == ("x", 1, "7", 2, "3")
    assert first.file.endswith(suffix)
    turns = (("<image>\nWhat?", "A dog."), ("Sure?", "Yes."))
    assert content(first) == (turns, (ImageFile("root", "coco/a.png"),), None)
    images = (FILE, ImageFile("root", "b.png"))
    assert content(second) == ((("<image> or <image>?", "This."),), images, None)
    assert content(third) == ((("Hello", "Good day."),), (), None)


def test_llava_with_a_system_prompt(read_records):
    opening = llava("q", "a")
    opening["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    field = llava("q", "a", system="Be brief.")
    both = {**opening, "system": "Be brief."}
    for record in read_records([opening, field, both]):
        assert content(record) == ((("q", "a"),), (), "Be brief.")
    [reason] = read_records([{**opening, "system": "Be long."}])
    assert reason == (
        "system: expected the text of the opening system message, or none, got 'Be long.'"
    )


def test_llava_parquet_with_embedded_images(read_records):
    """LLaVA-OneVision-Data and LLaVA-ReCap; text records have a null image."""
    message = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", HF_IMAGE),
            ("conversations", pa.list_(message)),
            ("data_source", pa.string()),
        ]
    )
    image = {"bytes": PNG, "path": "a.png"}
    records = [
        llava("<image>\nq", "a", id="1", image=image, data_source="x"),
        llava("q", "a", id="2", image=None, data_source="x"),
        llava("q", "a", id="3", image={"bytes": None, "path": None}, data_source="x"),
    ]
    first, *others = read_records(records, ".parquet", schema)
    assert content(first) == ((("<image>\nq", "a"),), (EmbeddedImage("a.png", PNG),), None)
    assert [content(record) for record in others] == [((("q", "a"),), (), None)] * 2


# Hugging Face and TRL


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_messages(read_records, suffix):
    records = [
        {"messages": chat("Hello", "Good day.", "Bye", "Bye."), "id": "x"},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("q", "a")], "id": "y"},
    ]
    first, second = read_records(records, suffix)
    assert content(first) == ((("Hello", "Good day."), ("Bye", "Bye.")), (), None)
    assert content(second) == ((("q", "a"),), (), "Be brief.")


def test_messages_with_images_in_a_field(read_records):
    """TRL. Without `<image>` or image parts, the images come before the first question."""
    parts = [
        {"type": "image", "text": None},
        {"type": "text", "text": "What?"},
        {"type": "image"},
        {"type": "text", "text": ""},
    ]
    answer = [{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]
    images = [{"bytes": PNG, "path": None}, {"bytes": PNG, "path": "b.png"}]
    schema = pa.schema(
        [
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("images", pa.list_(HF_IMAGE)),
        ]
    )
    expected = (EmbeddedImage("", PNG), EmbeddedImage("b.png", PNG))
    texts = [
        {"messages": chat("What?", "A dog."), "images": images},
        {"messages": chat("What <image>\n? <image>", "A dog."), "images": images},
    ]
    first, second = read_records(texts, ".parquet", schema)
    assert content(first) == ((("<image>\n<image>\nWhat?", "A dog."),), expected, None)
    assert content(second) == ((("What <image>\n? <image>", "A dog."),), expected, None)
    [third] = read_records([{"messages": chat(parts, answer), "images": images}], ".parquet")
    assert content(third) == ((("<image>\nWhat?<image>\n", "A dog."),), expected, None)


@pytest.mark.parametrize("name", ["image", "path"])
def test_messages_with_images_in_their_parts(read_records, name):
    parts = [
        {"type": "image", name: "a.png", "metadata": {"width": 3, "url": "x"}},
        {"type": "text", "text": "What?"},
    ]
    record = {"messages": chat(parts, [{"type": "text", "text": "A dog."}])}
    expected = (("<image>\nWhat?", "A dog."),)
    for found in read_records([record]) + read_records([record], ".parquet"):
        assert content(found) == (expected, (FILE,), None)
    parts[0][name] = {"bytes": PNG, "path": "a.png"}
    [found] = read_records([record], ".parquet")
    assert content(found) == (expected, (EmbeddedImage("a.png", PNG),), None)


# FineVision, The Cauldron, Docmatix


def test_finevision(read_records):
    ratings = ["relevance", "image_correspondence", "visual_dependency", "formatting"]
    text = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = pa.schema(
        [
            ("images", pa.list_(HF_IMAGE)),
            ("texts", pa.list_(text)),
            ("source", pa.string()),
            *((f"{name}_ratings", pa.list_(pa.int64())) for name in ratings),
            *((f"{name}_min", pa.int64()) for name in ratings),
        ]
    )
    numbers = {f"{name}_ratings": [4, 5] for name in ratings}
    numbers |= {f"{name}_min": 4 for name in ratings}
    texts = [{"user": "What?", "assistant": "A dog."}, {"user": "Sure?", "assistant": "Yes."}]
    images = [{"bytes": PNG, "path": None}]
    records = [
        {"images": images, "texts": texts, "source": "ai2d", **numbers},
        {"images": [], "texts": texts[:1], "source": "text_code", **numbers},
    ]
    first, second = read_records(records, ".parquet", schema)
    turns = (("<image>\nWhat?", "A dog."), ("Sure?", "Yes."))
    assert content(first) == (turns, (EmbeddedImage("", PNG),), None)
    assert content(second) == ((("What?", "A dog."),), (), None)


def test_the_cauldron(read_records):
    texts = [{"user": "What?", "assistant": "A dog.", "source": "VQAv2"}]
    [record] = read_records(
        [{"images": [{"bytes": PNG, "path": None}] * 2, "texts": texts}], ".parquet"
    )
    assert record.turns == (("<image>\n<image>\nWhat?", "A dog."),)


# Tables of questions and answers, whose columns the config names


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        # DocVQA and TextVQA have several answers, of which the first counts.
        (
            {"questionId": "1", "question": "q", "answers": ["a", "b"], "ocr_tokens": ["x"]},
            ColumnsConfig("question", "answers", "image"),
        ),
        (  # VQAv2
            {"question": "q", "multiple_choice_answer": "a", "answers": [{"answer": "b"}]},
            ColumnsConfig("question", "multiple_choice_answer", "image"),
        ),
        (  # ChartQA
            {"query": "q", "label": ["a"], "human_or_machine": 1},
            ColumnsConfig("query", "label", "image"),
        ),
        (  # GQA, with an image column of another name
            {"question": "q", "answer": "a", "fullAnswer": "b", "picture": "own"},
            ColumnsConfig("question", "answer", "picture"),
        ),
    ],
)
def test_tables(read_records, record, columns):
    image = {"bytes": PNG, "path": "a.png"}
    record = {**record, columns.image: image}
    [found] = read_records([record], ".parquet", columns=columns)
    assert content(found) == ((("<image>\nq", "a"),), (EmbeddedImage("a.png", PNG),), None)
    [found] = read_records([record | {columns.image: None}], ".parquet", columns=columns)
    assert content(found) == ((("q", "a"),), (), None)
    [found] = read_records([record | {columns.image: "a.png", "system": "s"}], columns=columns)
    assert content(found) == ((("<image>\nq", "a"),), (FILE,), "s")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "q"}, "reply: expected a text, got None"),
        ({"reply": "a"}, "question: expected a text, got None"),
        ({"question": ["q"], "reply": "a"}, "question: expected a text, got ['q']"),
        ({"question": "q", "reply": []}, "reply: expected a text, got []"),
        ({"question": "q", "reply": [{"answer": "a"}]}, "reply: expected a text, got {'answer': "),
        ({"question": "q", "reply": 3}, "reply: expected a text, got 3"),
        ({"question": "q", "reply": " "}, "answer: expected a text that is not blank, got ' '"),
        ({"question": "q", "reply": "a", "query": "r"}, f"query: {UNUSED}'r'"),
        ({"question": "q", "reply": "a", "instruction": "r"}, f"instruction: {UNUSED}'r'"),
        ({"question": "q", "reply": "a", "choices": ["b"]}, f"choices: {UNUSED}['b']"),
        ({"question": "q", "reply": "a", "hint": "b"}, f"hint: {UNUSED}'b'"),
        ({"question": "q", "reply": "a", "image": "b.png"}, f"image: {UNUSED}'b.png'"),
        ({"question": "q", "reply": "a", "video": "b"}, f"video: {UNUSED}'b'"),
    ],
)
def test_tables_that_the_columns_do_not_describe_are_rejected(record, reason):
    columns = ColumnsConfig("question", "reply", "picture")
    assert parse(record, columns=columns).startswith(reason)


@pytest.mark.parametrize("name", [None, ["x"], {"a": 1}, 0.5])
def test_an_id_that_is_none_is_the_number_of_the_record(name):
    assert parse(llava("q", "a", id=name), line=7).id == "7"
