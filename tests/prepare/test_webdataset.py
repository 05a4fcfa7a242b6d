import json
import re
import tarfile

import pytest

from moddistill.prepare.webdataset import WebDatasetRecords, split_name
from tests.prepare.conftest import image, read_rejected, read_shards, talk, write_tar

RED, BLUE = image((255, 0, 0)), image((0, 0, 255), kind="JPEG")


def turns(record):
    return [turn["value"] for turn in record["conversations"]]


def data(record):
    return [each["bytes"] for each in record.get("images", ())]


def as_json(record):
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("1.jpg", "1", "jpg"),
        ("a/1.left.JPG", "a/1", "left.jpg"),
        ("a.b/1.txt", "a.b/1", "txt"),
        ("README", "", ""),
        (".hidden", "", ""),
        ("a/.jpg", "", ""),
        ("a/1.", "", ""),
    ],
)
def test_a_name_is_split_at_the_first_dot_of_its_last_part(name, key, extension):
    assert split_name(name) == (key, extension)


def test_samples_are_records_with_the_images_of_the_same_key(tmp_path, prepare):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a/1.jpg", BLUE),
            ("a/1.json", as_json(talk("elsewhere.jpg", id="x"))),
            ("a/2.json", as_json(talk())),
            ("a/2.cls", b"7"),
            ("README", b"text"),
            ("a/3.0.png", RED),
            ("a/3.1.JPEG", BLUE),
            ("a/3.json", as_json(talk(["b/3.1.jpeg", "3.0.png"], question="or <image>?"))),
        ],
    )
    first, second, third = read_shards(prepare("webdataset", "--from", path))
    assert (first["id"], turns(first), data(first)) == (
        "x",
        ["<image>\nWhat is this?", "A dog."],
        [BLUE],
    )
    assert (second["id"], data(second)) == ("a/2", [])
    assert (third["id"], data(third)) == ("a/3", [BLUE, RED])  # in the order of the record
    assert [each["path"] for each in third["images"]] == ["a/3.1.jpeg", "a/3.0.png"]


def test_images_without_names_are_in_the_order_of_their_numbers(tmp_path, prepare):
    """A tar is often sorted, with 10 before 2."""
    files = [("1.10.png", RED), ("1.2.jpg", BLUE), ("1.jpg", RED), ("1.txt", b"Three.")]
    [record] = read_shards(prepare("webdataset", "--from", write_tar(tmp_path / "a.tar", files)))
    assert [each["path"] for each in record["images"]] == ["1.jpg", "1.2.jpg", "1.10.png"]


def test_captions_have_a_question_of_the_flag(tmp_path, prepare):
    metadata = as_json({"url": "http://x", "caption": "A cat", "width": 8})
    files = [("1.jpg", BLUE), ("1.json", metadata), ("1.txt", b"A cat.\n"), ("2.png", RED)]
    path = write_tar(tmp_path / "a.tar", [*files, ("2.txt", "Une été.".encode())])
    first, second = read_shards(prepare("webdataset", "--from", path))
    assert turns(first) == ["<image>", "A cat."]
    assert turns(second) == ["<image>", "Une été."]
    asked = prepare("webdataset", "--from", path, "--question", "What?", to="asked")
    assert turns(read_shards(asked)[0]) == ["<image>\nWhat?", "A cat."]


def link(name, kind=tarfile.SYMTYPE):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("1.jpg", BLUE)], "fields of the record: expected conversations, messages or texts"),
        ([("1.txt", b"A cat.")], "1.txt: expected an image next to the caption, got none"),
        (
            [("1.jpg", BLUE), ("1.mask.png", RED), ("1.txt", b"x")],
            r"images of 1: expected names with a number, or .*, got \['1.jpg', '1.mask.png'\]",
        ),
        (
            [("1.0.jpg", BLUE), ("1.1.jpg", RED), ("1.json", as_json(talk(["1.0.jpg", "2.jpg"])))],
            r"images of 1: expected names of the files of the sample, .* got \['1.0.jpg', '2.jpg'",
        ),
        (
            [(f"1.{'9' * 5000}.jpg", BLUE), ("1.2.jpg", RED), ("1.txt", b"x")],
            r"images of 1: expected names with a number",
        ),
        ([("1.jpg", BLUE), ("1.json", b"{")], "1.json: expected JSON"),
        ([("1.jpg", BLUE), ("1.json", b"[]")], r"1.json: expected a JSON object, got \[\]"),
        ([("1.jpg", BLUE), ("1.txt", b"\xff")], "1.txt: expected UTF-8 text"),
        ([("1.jpg", BLUE), ("1.txt", b" ")], "answer: expected a text that is not blank"),
        (
            [("1.jpg", BLUE), ("1.json", as_json(talk("x"))), ("1.txt", b"x")],
            "1: expected a record in .json or a caption in .txt, got both",
        ),
        ([("1.jpg", b"text"), ("1.txt", b"x")], r"1\.jpg: expected a readable image"),
        ([("1.json", as_json(talk("x.png")))], "image: expected a file in one of --images"),
        (
            [("1.jpg", BLUE), ("1.jpg", RED), ("1.txt", b"x")],
            "1: expected one file .jpg, got several",
        ),
        ([(link("1.jpg"), b""), ("1.txt", b"x")], "1.jpg: expected a plain file, got a link"),
        (
            [(link("1.jpg", tarfile.CHRTYPE), b""), ("1.txt", b"x")],
            "1.jpg: expected a plain file, got a device",
        ),
        (
            [("../1.jpg", BLUE), ("../1.txt", b"x")],
            "expected one inside of its folder or archive, got '../1.jpg'",
        ),
    ],
)
def test_a_bad_sample_is_rejected_and_its_neighbours_are_not(tmp_path, prepare, files, reason):
    good = [[(f"{key}.png", RED), (f"{key}.txt", b"Red.")] for key in ("0", "9")]
    folder = prepare("webdataset", "--from", write_tar(tmp_path / "a.tar", good[0] + good[1]))
    expected = read_shards(folder)
    path = write_tar(tmp_path / "b.tar", good[0] + files + good[1])
    folder = prepare("webdataset", "--from", path, to="b")
    assert read_shards(folder) == expected
    [(line, text)] = read_rejected(folder)
    assert line == 2
    assert re.search(reason, text), text


def test_a_range_of_shards_is_read_in_order(tmp_path, prepare):
    for number in range(9, 12):
        files = [("x.png", RED), ("x.txt", b"%d" % number)]
        write_tar(tmp_path / f"{number:03d}.tar", files)
    folder = prepare("webdataset", "--from", tmp_path / "{009..011}.tar")
    assert [turns(record)[1] for record in read_shards(folder)] == ["9", "10", "11"]


def test_a_sample_is_read_by_its_byte_range(tmp_path):
    files = [each for i in range(5) for each in ((f"{i}.png", RED), (f"{i}.txt", b"%d" % i))]
    records = WebDatasetRecords(write_tar(tmp_path / "a.tar", files))
    [places] = records.places()
    assert places.line.tolist() == [1, 2, 3, 4, 5]
    third = type(places)(*(column[2:3] for column in places))
    [fields] = records.fields(third)
    assert fields["conversations"][1]["value"] == "2"
