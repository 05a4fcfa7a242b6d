import json
import shutil
import zipfile

import pytest

from tests.prepare.conftest import (
    image,
    read_rejected,
    read_shards,
    talk,
    write_json,
    write_tar,
    write_zip,
)

RED, BLUE = image((255, 0, 0)), image((0, 0, 255))


def as_json(*records):
    return json.dumps(records).encode()


def images(folder):
    return [record["images"][0]["bytes"] for record in read_shards(folder)]


@pytest.mark.parametrize(("form", "write"), [("zip", write_zip), ("tar", write_tar)])
def test_records_inside_of_an_archive_name_its_members(tmp_path, prepare, form, write):
    records = as_json(talk("images/1.png"), talk("images/2.png"))
    files = [("train.json", records), ("images/1.png", RED), ("images/2.png", BLUE)]
    folder = prepare(form, "--from", write(tmp_path / f"a.{form}", files))
    assert images(folder) == [RED, BLUE]


@pytest.mark.parametrize(("form", "write"), [("zip", write_zip), ("tar", write_tar)])
def test_records_outside_of_archives_name_members_of_any(tmp_path, prepare, form, write):
    write(tmp_path / f"1.{form}", [("1.png", RED)])
    write(tmp_path / f"2.{form}", [("2.png", BLUE)])
    records = write_json(tmp_path / "train.json", [talk("2.png"), talk("1.png"), talk("3.png")])
    folder = prepare(form, "--from", tmp_path / f"*.{form}", "--records", records)
    assert images(folder) == [BLUE, RED]
    [(line, reason)] = read_rejected(folder)
    assert line == 3
    assert "expected a file in" in reason


def test_names_may_be_relative_to_the_folder_of_the_records(tmp_path, prepare):
    files = [("set/train.jsonl", as_json(talk("1.png"))[1:-1]), ("set/1.png", RED)]
    path = write_zip(tmp_path / "a.zip", files, compression=zipfile.ZIP_DEFLATED)
    assert images(prepare("zip", "--from", path)) == [RED]


def test_a_pattern_chooses_the_records_of_an_archive(tmp_path, prepare):
    files = [("a.json", as_json(talk("1.png"))), ("b.json", b"{}"), ("1.png", RED)]
    path = write_zip(tmp_path / "a.zip", files)
    assert images(prepare("zip", "--from", path, "--records", "a*")) == [RED]


def test_rejected_records_name_the_archive_and_the_member(tmp_path, prepare):
    path = write_zip(tmp_path / "a.zip", [("x/train.json", as_json(talk(), talk("../1.png")))])
    folder = prepare("zip", "--from", path)
    [item] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert (item["file"], item["line"]) == (f"{path}/x/train.json", 2)
    assert "expected one inside of its folder or archive, got '../1.png'" in item["reason"]


def refusal(prepare, *flags):
    with pytest.raises(SystemExit) as error:
        prepare(*flags)
    return str(error.value)


def test_an_archive_without_records_is_refused(tmp_path, prepare):
    path = write_zip(tmp_path / "a.zip", [("1.png", RED)])
    assert "expected a .json or .jsonl member, or --records=FILE" in refusal(
        prepare, "zip", "--from", path
    )
    assert "got 'none.json', which matches none" in refusal(
        prepare, "zip", "--from", path, "--records", "none.json", "--to", "x"
    )


def test_records_that_inflate_to_much_more_than_text_does_are_refused(tmp_path, prepare):
    bomb = b"[" + b" " * 50_000_000 + b"]"
    path = write_zip(tmp_path / "a.zip", [("x.json", bomb)], compression=zipfile.ZIP_DEFLATED)
    message = refusal(prepare, "zip", "--from", path)
    assert "200 times their compressed size, got 50,000,002 bytes" in message


def test_an_archive_that_has_changed_is_read_again_in_the_same_process(tmp_path, prepare):
    path = tmp_path / "a.zip"
    write_zip(path, [("x.json", as_json(talk("1.png"))), ("1.png", RED)])
    assert images(prepare("zip", "--from", path)) == [RED]
    shutil.rmtree(tmp_path / "out")
    write_zip(path, [("1.png", BLUE), ("y.json", as_json(talk("1.png")))])
    assert images(prepare("zip", "--from", path)) == [BLUE]
