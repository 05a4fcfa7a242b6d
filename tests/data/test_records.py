import pickle

import pytest

from moddistill.data.image_files import EmbeddedImage, ImageFile
from moddistill.data.records import PreferencePair, Record
from moddistill.errors import UserError

IMAGE = ImageFile("root", "a.png")


def record(*texts, images=(), system=None):
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Record("f.json", 1, "1", tuple(images), turns, system)


def pair(question, chosen, rejected, history=(), images=(), system=None):
    return PreferencePair(
        "f.json", 1, "1", tuple(images), tuple(history), question, chosen, rejected, system
    )


def test_a_record_has_an_image_for_each_placeholder_in_its_questions():
    embedded = EmbeddedImage("b.png", b"bytes")
    assert record("Hello", "Good day.").images == ()
    assert record("<image> or <image>?", "This.", images=[IMAGE, embedded]).images[1] is embedded
    assert record("<image>?", "A dog.", "And <image>?", "A cat.", images=[IMAGE] * 2)
    assert pair("<image>?", "a", "b", history=[("<image>", "c")], images=[IMAGE] * 2)


def test_records_are_compared_by_their_content_and_pickled():
    assert record("q", "a") == record("q", "a") != record("q", "b")
    for each in (record("<image>", "a", images=[IMAGE]), pair("q", "a", "b", system="s")):
        assert pickle.loads(pickle.dumps(each)) == each


BLANK = r"answer: expected a text that is not blank, got ' \n'"
PLACEHOLDER = "answer: expected no <image>, which only questions contain, got 'see <image>'"
SYSTEM = "system: expected no <image>, which only questions contain, got '<image>'"
SURROGATE = (
    "text: expected valid Unicode, got 'utf-8' codec can't encode character '\\udc00' in position "
    "1: surrogates not allowed"
)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: record("q", " \n"), BLANK),
        (lambda: record("q", "a", "q", " \n"), BLANK),
        (lambda: record("q", "see <image>", images=[IMAGE]), PLACEHOLDER),
        (lambda: record("q", "a", system="<image>"), SYSTEM),
        (lambda: record("x\udc00", "a"), SURROGATE),
        (lambda: record("q", "x\udc00"), SURROGATE),
        (lambda: record("q", "a", system="x\udc00"), SURROGATE),
        (lambda: record("<image>", "a"), "number of <image>: expected 0, one per image, got 1"),
        (
            lambda: record("q", "a", images=[IMAGE]),
            "number of <image>: expected 1, one per image, got 0",
        ),
        (
            lambda: record("<image>", "a", "<image>", "a", images=[IMAGE] * 3),
            "number of <image>: expected 3, one per image, got 2",
        ),
        (lambda: pair("q", " \n", "a"), BLANK),
        (lambda: pair("q", "a", " \n"), BLANK),
        (lambda: pair("q", "a", "b", history=[("q", " \n")]), BLANK),
        (lambda: pair("q", "see <image>", "a", images=[IMAGE]), PLACEHOLDER),
        (lambda: pair("q", "a", "see <image>", images=[IMAGE]), PLACEHOLDER),
        (lambda: pair("q", "a", "b", history=[("q", "see <image>")]), PLACEHOLDER),
        (lambda: pair("q", "a", "b", system="<image>"), SYSTEM),
        (lambda: pair("q", "a", "x\udc00"), SURROGATE),
        (lambda: pair("x\udc00", "a", "b"), SURROGATE),
        (lambda: pair("q", "a", "b", history=[("x\udc00", "c")]), SURROGATE),
        (lambda: pair("q", "a", "a"), "rejected: expected another text than chosen, got 'a'"),
        (
            lambda: pair("<image>", "a", "b", history=[("<image>", "c")], images=[IMAGE]),
            "number of <image>: expected 1, one per image, got 2",
        ),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_an_error(make, reason):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == reason


def test_a_long_text_is_shown_in_part():
    with pytest.raises(UserError) as error:
        record("q", "<image>" + "x" * 10**6)
    assert len(str(error.value)) < 300
