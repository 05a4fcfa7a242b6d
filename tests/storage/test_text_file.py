import errno
import os
from pathlib import Path

import pytest

from moddistill.errors import UserError
from moddistill.storage import text_file
from moddistill.storage.text_file import append_lines, replace_text


def test_file_is_replaced(tmp_path):
    file = tmp_path / "a.json"
    for text in ("eins\n", "zwölf\n"):
        replace_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_write_leaves_the_file_as_it_was(step, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    replace_text(file, "before")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], interrupt)
        replace_text(file, "after")
    assert file.read_text() == "before"
    replace_text(file, "after")
    assert file.read_text() == "after"


def test_a_line_that_was_cut_is_ended_first(tmp_path):
    file = tmp_path / "a.jsonl"
    append_lines(file, b"1\n2\n")
    file.write_bytes(file.read_bytes() + b"3")
    append_lines(file, b"4\n")
    assert file.read_bytes() == b"1\n2\n3\n4\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("write", [replace_text, append_lines])
def test_full_disk_is_an_error_that_names_the_file(write, code, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=rf"a\.json: expected a disk with .* '{os.strerror(code)}'"):
        write(tmp_path / "a.json", "x" if write is replace_text else b"x")


def test_other_errors_stay_as_they_are(tmp_path):
    file = tmp_path / "none" / "a.json"
    with pytest.raises(FileNotFoundError) as raised:
        replace_text(file, "x")
    assert raised.value.filename == str(file)  # not that of the unfinished one
    with pytest.raises(ValueError, match=r"^other$"), text_file.writing("a"):
        raise ValueError("other")
