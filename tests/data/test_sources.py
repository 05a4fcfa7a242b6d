import pickle

import numpy as np
import pytest

from moddistill.config import ColumnsConfig, SourceConfig
from moddistill.data.indexing import IndexSpec
from moddistill.data.rows import needed_image_slots
from moddistill.data.sources import Limits, Source, check_source

LIMITS = Limits(max_length=60, max_images=1)


def talk(question, answer, **fields):
    human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    return {"conversations": [human, gpt], **fields}


@pytest.fixture
def open_source(small, tmp_path):
    def open_(path, limits=LIMITS, images=None, kind="conversation", template="chatml"):
        config = SourceConfig(path, str(tmp_path) if images is None else images)
        spec = IndexSpec(kind, template, 3, small, ColumnsConfig())
        return Source(config, spec, limits, "config.data.sources.a")

    return open_


MIXED = [
    talk("q", "zero"),
    talk("q", ""),
    talk("<image> <image>", "two", image=["a.png", "a.png"]),
    talk("q " * 100, "three"),
    talk("q", "four " * 100),
    talk("<image>", "five", image="a.png"),
]


def test_source_holds_the_usable_records_of_its_file(open_source, data_file):
    source = open_source(data_file(MIXED))
    assert (len(source), source.total, source.with_images) == (3, 6, 2)
    assert [source[i].turns[0][1].split()[0] for i in range(3)] == ["zero", "four", "five"]
    assert [source.place(i)[1] for i in range(3)] == [1, 5, 6]
    expected = [min(int(source._files[0].index.tokens[i]), 60) for i in (5, 4, 0)]
    assert source.lengths(np.array([2, 1, 0])).tolist() == expected
    assert expected[1] == 60


def test_records_left_out_and_truncated_have_their_reasons(open_source, data_file):
    source = open_source(data_file(MIXED))
    reasons = {item.line: item.reason for item in source.left_out()}
    assert reasons.keys() == {2, 3, 4}
    assert reasons[2] == "answer: expected a text that is not blank, got ''"
    assert reasons[3] == "images of the record: expected <= data.max_images 1, got 2"
    assert reasons[4].startswith("tokens: expected all images and an answer token within data.max_")
    [truncated] = source.truncated()
    assert (truncated.line, truncated.reason.partition(" ")[2]) == (5, "tokens are truncated to 60")


def test_preference_pair_longer_than_max_length_is_left_out(open_source, data_file):
    pairs = [{"question": "q", "chosen": "a", "rejected": text} for text in ("b", "b " * 200)]
    source = open_source(data_file(pairs), kind="preference")
    assert len(source) == 1
    assert [item.line for item in source.left_out()] == [2]
    assert not list(source.truncated())


def test_source_of_several_files_has_their_records_in_order(open_source, data_file, tmp_path):
    for number, name in enumerate(["b.jsonl", "a.json", "c.json"]):
        data_file([talk("q", f"{name} {i}") for i in range(number + 2)], name)
    source = open_source(f"{tmp_path}/*.json*")
    answers = [source[i].turns[0][1] for i in range(len(source))]
    assert answers == ["a.json 0", "a.json 1", "a.json 2", "b.jsonl 0", "b.jsonl 1"] + [
        f"c.json {i}" for i in range(4)
    ]
    assert len(source.digests) == 3
    every = source.lengths(np.arange(9))
    np.testing.assert_array_equal(source.lengths(np.array([8, 0, 4])), every[[8, 0, 4]])


def test_digest_of_images_is_that_of_all_records_usable_or_not(open_source, data_file, tmp_path):
    """A teacher and a student have place for different records."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    path = data_file([*MIXED, talk("<image> <image>", "six", image=["a.png", "b.png"])])
    one, two = (open_source(path, Limits(60, images)) for images in (1, 2))
    digest = one.images_digest
    assert len(one) != len(two) and digest == two.images_digest
    (tmp_path / "b.png").write_bytes(b"another")  # of a record that only one of them can use
    assert open_source(path).images_digest != digest
    assert open_source(data_file(MIXED[:2], "text.json")).images_digest == ""


def test_positions_count_all_records_of_all_files(open_source, data_file, tmp_path):
    data_file(MIXED, "a.jsonl")
    data_file(MIXED[:2] * 2, "b.jsonl")
    source = open_source(f"{tmp_path}/*.jsonl")
    numbers = np.array([4, 0, 3, 1])
    assert source.positions(numbers).tolist() == [8, 0, 6, 4]
    np.testing.assert_array_equal(
        source.lengths_at(source.positions(numbers)), source.lengths(numbers)
    )
    assert source.lengths_at(np.array([1])) == 0  # a record without a sample


@pytest.mark.parametrize("images", [1, 2])
def test_row_of_the_densest_samples_has_place_for_all_their_images(
    images, open_source, data_file, image_file
):
    """For each length that a sample can have, of which some have no exact quotient in floats."""
    image_file("a.png")
    question = "<image>" * images
    for words in range(1, 90):
        record = talk(question, " a" * words, image=["a.png"] * images)
        path = data_file([talk("q", "text"), record], f"{words}.json")
        tokens = int(open_source(path, Limits(10**6, 3)).lengths(np.array([1]))[0])
        for samples in (1, 2, 7):
            source = open_source(path, Limits(samples * tokens, 3))
            assert needed_image_slots([source], packing=True) == samples * images
            assert needed_image_slots([source], packing=False) == images


def test_table_needs_the_columns_of_questions_and_answers(data_file):
    path = data_file([talk("q", "a")])
    with pytest.raises(ValueError, match=r"columns: expected both question and answer, or neither"):
        check_source(SourceConfig(path, columns=ColumnsConfig(question="query")))


def test_image_column_that_no_record_has_is_an_error(small, data_file):
    path = data_file([{"query": "q", "label": "a", "scan": "a.png"}])
    columns = ColumnsConfig("query", "label", "scans")
    spec = IndexSpec("conversation", "chatml", 3, small, columns)
    with pytest.raises(
        ValueError, match=r"columns\.image: expected a field with images, .*'scans'"
    ):
        Source(SourceConfig(path, columns=columns), spec, LIMITS, "config.data.sources.a")


def test_copy_in_another_process_maps_the_index_again(open_source, data_file, monkeypatch):
    monkeypatch.setattr("moddistill.data.index._SMALL", 100)
    source = open_source(data_file([talk("q", str(i)) for i in range(2000)]))
    assert len(pickle.dumps(source.__dict__["_files"])) < 2000
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1234] == source[1234]
    assert isinstance(copy._files[0].index.tokens, np.memmap)


def test_source_without_usable_records_is_an_error(open_source, data_file):
    path = data_file([talk("q", ""), talk("q " * 100, "a")])
    message = (
        r"data\.json: expected a usable record, got 2 that are left out, such as record 1 of .*: an"
    )
    with pytest.raises(ValueError, match=message):
        open_source(path)
    with pytest.raises(ValueError, match=r"empty\.json: expected a record, got none"):
        open_source(data_file([], "empty.json"))


def test_named_images_need_an_image_folder(open_source, data_file):
    path = data_file([talk("q", "a"), talk("<image>", "a", image="a.png")])
    message = r"image folder of .*data\.json: expected an existing folder, since record 2 has an im"
    with pytest.raises(ValueError, match=message):
        open_source(path, images="")
    with pytest.raises(
        ValueError, match=r"image folder of .*: expected an existing folder, got 'no"
    ):
        check_source(SourceConfig(path, "no/such"))


def test_missing_file_is_an_error():
    with pytest.raises(ValueError, match=r"gone/\*\.json: expected a file, or a pattern of files"):
        check_source(SourceConfig("gone/*.json"))
    with pytest.raises(ValueError, match=r"expected one that ends with \.json, .*got '.*\.py'"):
        check_source(SourceConfig(__file__))
