import os

import pytest

from moddistill.data.array_records import ArrayRecordFile
from moddistill.data.json_files import JsonFile
from moddistill.data.parquet_files import ParquetFile
from moddistill.data.record_files import find_files, open_file
from moddistill.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns the working directory, with empty files of records."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.json", "a.jsonl", "a.parquet", "sub/c.json", "sub/deep/d.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("b.json", ["b.json"]),
        ("*.json*", ["a.jsonl", "b.json"]),
        ("sub/*.json", ["sub/c.json"]),
        ("**/*.json", ["b.json", "sub/c.json", "sub/deep/d.json"]),
        ("[ab].json", ["b.json"]),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_source_is_a_file_or_the_sorted_files_of_a_pattern(path, files):
    assert find_files(path) == files


def test_a_name_with_brackets_may_be_that_of_a_file(folder):
    (folder / "[ab].json").touch()
    assert find_files("[ab].json") == ["[ab].json"]


def test_folders_are_not_files_of_records(folder):
    (folder / "e.json").mkdir()
    assert find_files("*.json") == ["b.json"]
    with pytest.raises(UserError, match=r"e\.json: expected a file, or a pattern of files, got no"):
        find_files("e.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "array_record"])
def test_pipes_and_devices_are_not_files_of_records(folder, suffix):
    os.mkfifo(folder / f"e.{suffix}")
    (folder / f"z.{suffix}").symlink_to("/dev/zero")
    for path in (f"e.{suffix}", f"z.{suffix}", f"[ez].{suffix}"):
        with pytest.raises(UserError, match=r"expected a file, or a pattern of files, got none"):
            find_files(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.json", "nowhere.json: expected a file, or a pattern of files, got none"),
        ("nowhere/*", "nowhere/*: expected a file, or a pattern of files, got none"),
        ("", ": expected a file, or a pattern of files, got none"),
        (
            "n*",
            "name of a file of records: expected one that ends with .json, .jsonl, .parquet or "
            ".array_record, got 'notes.txt'",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_source_without_files_of_records_is_an_error(path, message):
    with pytest.raises(UserError) as error:
        find_files(path)
    assert str(error.value) == message


@pytest.mark.parametrize("character", ["\n", "\x1b", "\udcff"])
def test_a_name_that_would_change_a_terminal_is_an_error_that_escapes_it(folder, character):
    (folder / "狗\u3000\u200cé a.json").touch()
    assert find_files("狗*.json") == ["狗\u3000\u200cé a.json"]
    (folder / f"x{character}.json").touch()
    with pytest.raises(UserError, match="expected no control characters, got 'x") as error:
        find_files("x*.json")
    assert str(error.value).isprintable()


@pytest.mark.usefixtures("folder")
def test_a_file_that_may_not_be_read_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may be run by root
    with pytest.raises(UserError, match=r"b\.json: expected a file that may be read, got no perm"):
        find_files("b.json")


def test_the_format_of_a_file_is_that_of_its_name():
    kinds = {
        "a.json": JsonFile,
        "a.jsonl": JsonFile,
        "a.parquet": ParquetFile,
        "a.array_record": ArrayRecordFile,
    }
    assert {name: type(open_file(name)) for name in kinds} == kinds
