"""A converted record is read as the published one, whatever form that has."""

import dataclasses

import pytest

from moddistill.data.array_records import unpack_record
from moddistill.data.forms import parse_record
from moddistill.data.image_decoding import ImageHeader
from moddistill.errors import UserError
from moddistill.prepare.convert import Converter
from moddistill.prepare.image_store import ImageStore, Place
from tests.prepare.conftest import image, talk

JPEG = image(size=(30, 20), kind="JPEG")
PAIR = {"chosen": "yes", "rejected": "no"}
PART = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "A dog."}
QUESTION = {"conversations": talk("1.png")["conversations"]}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def converter(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(image(size=(int(name[0]), 9)))
    return Converter(ImageStore([Place("", str(tmp_path))]), leave_out=("sam",))


@pytest.mark.parametrize(
    "fields",
    [
        talk(),
        talk("1.png", id="x"),
        talk("1.png", system="Be brief.", chosen=None, rejected=None),
        talk("1.png", image=["1.png"], width=640, score=float("nan"), data=b"x"),
        {"messages": [SYSTEM, PART, ANSWER], "images": ["1.png"]},
        {"messages": [{"role": "system", "content": ""}, PART, ANSWER], "images": ["1.png"]},
        {"messages": [{"role": "user", "content": "What?"}, ANSWER], "images": ["1.png", "2.png"]},
        {"messages": [{**PART, "content": [{"type": "image", "image": "1.png"}]}, ANSWER]},
        {"texts": [{"user": "a", "assistant": "b"}] * 2, "images": [{"bytes": JPEG, "path": None}]},
        {"question": "Is it?", "image": {"bytes": JPEG, "path": "x"}, **PAIR},
        {"prompt": [SYSTEM, PART, ANSWER, PART], "images": ["1.png", "2.png"], **PAIR},
        {"conversations": talk("1.png")["conversations"][:1], "image": "1.png", **PAIR},
        {"chosen": [PART, ANSWER], "rejected": [PART, ANSWER | {"content": "x"}], "img": "2.png"},
    ],
)
def test_a_converted_record_is_read_as_the_published_one(converter, fields):
    converted = converter(fields, "a.json", 7)
    unpacked = unpack_record(converted.data)
    kind = "preference" if fields.get("chosen") else "conversation"
    again = parse_record(unpacked, kind=kind, file="a.json", line=7, image_root="")
    assert again == dataclasses.replace(converted.record, images=converted.images)
    assert all(each.data in (JPEG, image(size=(1, 9)), image(size=(2, 9))) for each in again.images)
    assert {"chosen", "rejected", "conversations", "id", "images"} >= set(unpacked)


def test_headers_are_those_of_the_images(converter):
    fields = talk("1.png", question="<image>\nWhich?") | {"image": ["1.png", {"bytes": JPEG}]}
    converted = converter(fields, "a", 1)
    assert converted.headers == (ImageHeader("PNG", 1, 9), ImageHeader("JPEG", 30, 20))


def test_records_with_images_below_a_prefix_are_left_out_without_reading_them(converter):
    assert converter(talk("sam/images/missing.png"), "a", 1) is None
    assert converter(talk(), "a", 1) is not None
    with pytest.raises(UserError, match="expected a file in"):
        converter(talk("sam2/missing.png"), "a", 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([], "record: expected a JSON object"),
        ({"rejected": "x"}, "chosen: expected a text or messages"),
        (talk("1.png", video="x.mp4"), "video: expected none"),
        ({"question": "?", "image": {"bytes": b"%!PS", "path": "x"}, **PAIR}, "x: expected a read"),
    ],
)
def test_a_record_that_cannot_be_used_is_an_error(converter, fields, reason):
    with pytest.raises(UserError, match=reason):
        converter(fields, "a", 1)


@pytest.mark.parametrize(
    "fields",
    [talk("1.png", id="\ud800"), talk(image=[{"path": "\ud800", "bytes": JPEG}]) | QUESTION],
)
def test_lone_surrogates_outside_of_texts_are_preserved(fields, converter):
    converted = converter(fields, "a", 1)
    again = parse_record(
        unpack_record(converted.data), kind="conversation", file="a", line=1, image_root=""
    )
    assert again == dataclasses.replace(converted.record, images=converted.images)


def test_an_image_of_more_pixels_than_most_runs_accept_is_converted(tmp_path, converter):
    (tmp_path / "wide.png").write_bytes(image(size=(30_000, 1)))
    assert converter(talk("wide.png"), "a", 1).headers == (ImageHeader("PNG", 30_000, 1),)
