"""Images, metadata, and content that training would not use."""

import pytest

from moddistill.data.image_files import EmbeddedImage
from tests.data.published import FILE, PNG, UNUSED, chat, llava, parse

METADATA = {
    "id": "7", "sample_id": 3, "source": "coco", "data_source": "x", "dataset": "x", "model": "gpt",
    "width": 640, "height": [480], "score": 0.5, "url": "http://a/b.png", "category": "c",
    "metadata": {"question_type": "open", "task_instruction": "Look."}, "choice_list": ["a", "b"],
    "caption": "a dog", "question_id": 3, "question_type": "x", "image_id": 5, "image_size": [3, 4],
    "answer_type": "x", "language": "en", "license": "x", "prompt_id": "x", "label": 3,
    "score_chosen": 3.0, "origin_split": "{}", "idx": 3, "ds_name": "x", "relevance_min": 5,
    "relevance_ratings": [5], "image_correspondence_ratings": [4], "formatting_ratings": [3],
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_does_not_reject_a_record(name):
    plain = {"messages": chat("q", "a")}
    assert parse(plain | {name: METADATA[name]}, line=7).turns == (("q", "a"),)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", name: METADATA[name]}
    assert parse(pair, "preference").chosen == "a"


@pytest.mark.parametrize("name", ["image", "images", "img", "image_path"])
@pytest.mark.parametrize("value", ["", None, [], {}, {"bytes": None, "path": None}])
def test_an_empty_image_is_none(name, value):
    assert parse(llava("q", "a", **{name: value})).images == ()
    assert parse({"messages": chat("q", "a"), name: value}).turns == (("q", "a"),)


@pytest.mark.parametrize("name", ["image", "images", "img", "image_path"])
@pytest.mark.parametrize(
    "value", ["a.png", ["a.png"], {"path": "a.png"}, {"bytes": None, "path": "a.png"}]
)
def test_an_image_is_found_under_its_names(name, value):
    assert parse(llava("<image>q", "a", **{name: value})).images == (FILE,)
    assert parse({"messages": chat("q", "a"), name: value}).turns == (("<image>\nq", "a"),)


@pytest.mark.parametrize(
    "value", [PNG, [PNG], {"bytes": PNG}, {"bytes": PNG, "path": None}, {"bytes": PNG, "path": ""}]
)
def test_bytes_of_an_image_need_no_name(value):
    assert parse(llava("<image>q", "a", image=value)).images == (EmbeddedImage("", PNG),)


@pytest.mark.parametrize(
    "value",
    [
        7,
        True,
        [7],
        [None],
        [""],
        [[]],
        ["a.png", None],
        {"url": "x"},
        {"bytes": "text"},
        {"path": 3},
    ],
)
def test_an_image_that_is_none_is_rejected(value):
    reason = parse(llava("<image>q", "a", image=value))
    assert reason.startswith("image: expected a name, bytes, or an object with bytes or path, got ")


@pytest.mark.parametrize(
    "name", ["image_path", "img_path", "image_file", "image_url", "image_urls", "file_name"]
)
def test_other_names_of_an_image_are_metadata_next_to_it_and_content_without_it(name):
    record = {"messages": chat("q", "a"), name: "coco/a.png"}
    assert parse(record | {"image": "a.png"}).images == (FILE,)
    if name != "image_path":
        assert parse(record) == f"{name}: {UNUSED}'coco/a.png'"


@pytest.mark.parametrize("other", ["images", "img"])
def test_a_second_image_is_not_ignored(other):
    record = llava("<image>q", "a", image="a.png")
    assert parse(record | {other: "b.png"}) == f"{other}: {UNUSED}'b.png'"
    assert parse(record | {other: "a.png"}).images == (FILE,)


def test_a_record_has_fewer_images_than_an_index_can_count():
    assert len(parse({"messages": chat("q", "a"), "images": ["a.png"] * 65535}).images) == 65535
    reason = parse({"messages": chat("q", "a"), "images": ["a.png"] * 65536})
    assert reason == "number of images: expected at most 65535, got 65536"


def test_images_are_in_messages_or_in_a_field():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
    record = {"messages": chat(parts, "a"), "images": ["b.png"]}
    assert parse(record) == f"images: {UNUSED}['b.png']"


CONTENT = {
    "video": "a.mp4", "videos": ["a.mp4"], "audio": {"array": [0.5]}, "audios": ["a.wav"],
    "tools": [{"name": "x"}], "functions": [{"name": "x"}], "tool_calls": [3], "history": [["a"]],
    "context": "x", "documents": ["x"], "question": "x", "prompt": "x", "query": "x",
    "instruction": "x", "input": "x", "output": "x", "answer": "x", "answers": ["x"],
    "response": "x", "completion": "x", "chosen": "x", "rejected": "x",
    "rejected_response": "x", "rejected_messages": chat("x"), "rejected_conversations": ["x"],
    "Image": "a.png", "imgs": ["a.png"], "image_base64": "aGk=", "pixel_values": [[0]],
    "Question": "x", "system_prompt": "x", "conversation": chat("x"),
    "objects": {"bbox": [[0, 0, 1, 1]]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
def test_content_that_would_not_be_used_is_rejected_by_name(name):
    for record in (llava("q", "a"), {"messages": chat("q", "a")}):
        assert parse(record | {name: CONTENT[name]}).startswith(f"{name}: {UNUSED}")
        for empty in (None, "", [], {}, {"array": None, "path": None}):
            assert parse(record | {name: empty}).turns == (("q", "a"),)


@pytest.mark.parametrize(
    "name", sorted(CONTENT.keys() - {"chosen", "rejected", "question", "prompt"})
)
def test_content_of_a_pair_that_would_not_be_used_is_rejected_by_name(name):
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse(record | {name: CONTENT[name]}, "preference").startswith(f"{name}: {UNUSED}")


def test_a_second_question_is_rejected_by_name():
    record = {"prompt": "q", "question": "r", "chosen": "a", "rejected": "b"}
    assert parse(record, "preference") == f"prompt: {UNUSED}'q'"
    assert parse(llava("q", "a", messages=chat("r", "a"))).startswith(f"messages: {UNUSED}")
    assert parse(llava("q", "a", texts=[{"user": "r"}])).startswith(f"texts: {UNUSED}")


def test_content_that_repeats_the_conversation_is_not_lost():
    """Magpie, UltraChat and full-hh-rlhf."""
    record = llava("<image>\nq", "a", image="a.png", instruction="q", response="a", prompt="q")
    assert parse(record).turns == (("<image>\nq", "a"),)
    assert parse(record | {"response": "b"}) == f"response: {UNUSED}'b'"
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "response": "a", "question": "q"}
    assert parse(pair, "preference").chosen == "a"
    assert parse(pair | {"response": "b"}, "preference").rejected == "b"


@pytest.mark.parametrize(
    "name", ["images", "tool_calls", "function_call", "reasoning_content", "thinking", "audio"]
)
def test_content_of_a_message_that_would_not_be_used_is_rejected_by_name(name):
    record = {"messages": chat("q", "a")}
    record["messages"][1] |= {name: None, "name": "x", "id": 3}
    assert parse(record).turns == (("q", "a"),)
    record["messages"][1][name] = ["x"]
    assert parse(record) == f"{name}: {UNUSED}['x']"
    texts = [{"user": "q", "assistant": "a", name: ["x"]}]
    assert parse({"texts": texts}) == f"{name}: {UNUSED}['x']"


def test_the_same_field_is_named_whatever_the_order_of_a_set():
    record = llava("q", "a", video="x", audio="x", tools="x", prompt="x")
    assert parse(record) == f"video: {UNUSED}'x'"
