"""Preference pairs in the forms in which they are published, in files."""

import pyarrow as pa
import pytest

from moddistill.data.image_files import EmbeddedImage
from tests.data.published import (
    FILE,
    HF_IMAGE,
    PNG,
    chat,
    content,
    llava,
    parse,
)


def test_preference_json_of_the_reference(read_records):
    """Both sides are lists of turns with the question."""

    def turns(*values):
        return llava(*values)["conversations"]

    record = {
        "id": "x",
        "image": "a.png",
        "chosen": turns("<image>\nHow many?", "Two."),
        "rejected": turns("<image>\nHow many?", "Three."),
    }
    history = {
        "chosen": turns("What?", "Dogs.", "How many?", "Two."),
        "rejected": turns("What?", "Dogs.", "How many?", "Three."),
    }
    first, second = read_records([record, history], kind="preference")
    assert content(first) == ((), ("<image>\nHow many?", "Two.", "Three."), (FILE,), None)
    assert content(second) == ((("What?", "Dogs."),), ("How many?", "Two.", "Three."), (), None)


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_preference_of_texts(read_records, name):
    """TRL without messages, SPA-VL, MMPR."""
    record = {name: "How many?", "chosen": "Two.", "rejected": "Three.", "image": "a.png"}
    answers = ("<image>\nHow many?", "Two.", "Three.")
    for found in read_records([record], kind="preference") + read_records(
        [record], ".jsonl", kind="preference"
    ):
        assert content(found) == ((), answers, (FILE,), None)


ANSWERS = {"chosen": chat("", "Two.")[1:], "rejected": chat("", "Three.")[1:]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": chat("What?", "Dogs.", "How many?"), **ANSWERS},
        {"prompt": chat("What?", "Dogs.", "How many?"), "chosen": "Two.", "rejected": "Three."},
        {
            "chosen": chat("What?", "Dogs.", "How many?", "Two."),
            "rejected": chat("What?", "Dogs.", "How many?", "Three."),
        },
        {  # UltraFeedback: the first question again, and the chosen messages
            "prompt": "What?",
            "prompt_id": "x",
            "chosen": chat("What?", "Dogs.", "How many?", "Two."),
            "rejected": chat("What?", "Dogs.", "How many?", "Three."),
            "messages": chat("What?", "Dogs.", "How many?", "Two."),
            "score_chosen": 8.0,
        },
        {  # LLaMA-Factory: answers are single messages
            **llava("What?", "Dogs.", "How many?"),
            "chosen": {"from": "gpt", "value": "Two."},
            "rejected": {"from": "gpt", "value": "Three."},
        },
        {**llava("What?", "Dogs.", "How many?"), "chosen": "Two.", "rejected": "Three."},
    ],
    ids=["messages", "texts", "implicit prompt", "ultrafeedback", "llama-factory", "llava"],
)
@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_preference_of_messages(read_records, record, suffix):
    expected = ((("What?", "Dogs."),), ("How many?", "Two.", "Three."), (), None)
    [found] = read_records([record], suffix, kind="preference")
    assert content(found) == expected
    system = {"role": "system", "content": "Be brief."}
    with_system = record | {"system": "Be brief."}
    [found] = read_records([with_system], suffix, kind="preference")
    assert content(found) == (*expected[:-1], "Be brief.")
    if isinstance(record.get("prompt"), list):
        [found] = read_records(
            [record | {"prompt": [system, *record["prompt"]]}], kind="preference"
        )
        assert content(found) == (*expected[:-1], "Be brief.")


def test_preference_of_messages_with_images(read_records):
    """TRL's RLAIF-V."""
    prompt = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    answers = {
        name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        for name, text in (("chosen", "Two."), ("rejected", "Three."))
    }
    images = [{"bytes": PNG, "path": "a.png"}]
    record = {"prompt": chat(prompt), **answers, "images": images}
    expected = ((), ("<image>\nHow many?", "Two.", "Three."), (EmbeddedImage("a.png", PNG),), None)
    [found] = read_records([record], ".parquet", kind="preference")
    assert content(found) == expected
    implicit = {name: chat(prompt) + answers[name] for name in answers}
    [found] = read_records([{**implicit, "images": images}], ".parquet", kind="preference")
    assert content(found) == expected
    prompt[0]["image"] = images[0]
    for record in (
        {"prompt": chat(prompt), **answers},
        implicit,
        {"prompt": chat(prompt), **implicit},
    ):
        [found] = read_records([record], ".parquet", kind="preference")
        assert content(found) == expected


def test_rlaif_v(read_records):
    names = ["question", "chosen", "rejected", "origin_dataset", "origin_split", "idx"]
    schema = pa.schema(
        [
            ("ds_name", pa.string()),
            ("image", HF_IMAGE),
            *((name, pa.string()) for name in names),
            ("image_path", pa.string()),
        ]
    )
    record = {
        "ds_name": "RLAIF-V-Dataset",
        "image": {"bytes": PNG, "path": "llava1.5/1.jpg"},
        "question": "How many?",
        "chosen": "Two.",
        "rejected": "Three.",
        "origin_dataset": "VQAv2",
        "origin_split": '{"model": "llava", "type": "question answering"}',
        "idx": "llava15_7b_0",
        "image_path": "RLAIF-V-Dataset_000/1.jpg",
    }
    [found] = read_records([record], ".parquet", schema, kind="preference")
    images = (EmbeddedImage("llava1.5/1.jpg", PNG),)
    assert content(found) == ((), ("<image>\nHow many?", "Two.", "Three."), images, None)


OTHER = "rejected: expected the messages of chosen up to the last one, got other messages"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "q"}, "chosen: expected a text or messages, got None"),
        ({"question": "q", "chosen": "a"}, "rejected: expected a text or messages, got None"),
        (
            {"question": "q", "chosen": 3, "rejected": "b"},
            "chosen: expected a text or messages, go",
        ),
        (
            {"question": "q", "chosen": [], "rejected": "b"},
            "chosen: expected a list of messages, g",
        ),
        ({"question": 3, "chosen": "a", "rejected": "b"}, "question: expected a list of messages"),
        ({"chosen": "a", "rejected": "b"}, "question: expected a user message before the answers,"),
        (
            llava("q", "a", chosen="x", rejected="y"),
            "question: expected a user message before the answers, got user, assistant",
        ),
        (
            {"prompt": chat("q"), "chosen": chat("x"), "rejected": chat("y")},
            "role of the last message of chosen: expected assistant, got 'user'",
        ),
        ({"chosen": chat("q", "a"), "rejected": chat("r", "b")}, OTHER),
        ({"chosen": chat("q", "a"), "rejected": "b"}, OTHER),
        ({"prompt": "q", "chosen": "a", "rejected": chat("r", "b")}, OTHER),
        (
            {
                name: chat([{"type": "image", "image": image}], name)
                for name, image in (("chosen", "a.png"), ("rejected", "b.png"))
            },
            OTHER,
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected: expected another text than c"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "answer: expected a text that is not bl"),
        ({"prompt": "<image>", "chosen": "a", "rejected": "b"}, "number of <image>: expected 0, "),
        (llava("q", chosen="a", rejected="b", image="a.png"), "number of <image>: expected 1, one"),
        ({"prompt": "q", "chosen": "<image>", "rejected": "b"}, "answer: expected no <image>, whi"),
        ({"prompt": "q", "chosen": "x", "rejected": "\udc00"}, "text: expected valid Unicode, go"),
        (llava("q", "a"), "chosen: expected a text or messages, got None"),
    ],
)
def test_a_malformed_pair_is_rejected_with_a_reason(record, reason):
    found = parse(record, "preference")
    assert isinstance(found, str)
    assert found.startswith(reason)
