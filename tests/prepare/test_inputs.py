import gzip
import os

import pytest

from moddistill.errors import UserError
from moddistill.prepare.inputs import find_files


def files(*patterns):
    return [path.rpartition("/")[2] for path in find_files(list(map(str, patterns)), (".tar",))]


def test_files_are_found_by_name_pattern_and_range_in_order(tmp_path):
    for name in ("b-08.tar", "b-09.tar", "b-10.tar", "a[1].tar", "x.txt"):
        (tmp_path / name).write_text("")
    assert files(tmp_path / "b-{08..10}.tar") == ["b-08.tar", "b-09.tar", "b-10.tar"]
    assert files(tmp_path / "b-*.tar", tmp_path / "b-09.tar") == files(tmp_path / "b-{08..10}.tar")
    assert files(tmp_path / "a[1].tar") == ["a[1].tar"]
    assert files(tmp_path / "b-{0..0}{8..9}.tar") == ["b-08.tar", "b-09.tar"]


@pytest.mark.parametrize("pattern", ["missing.tar", "*.tgz", "{1..3}.tar"])
def test_a_pattern_without_files_is_refused(tmp_path, pattern):
    (tmp_path / "1.tar").write_text("")
    with pytest.raises(UserError, match=r"--from: expected files, got .* which matches none"):
        files(tmp_path / pattern)


def test_a_file_of_another_form_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"--from: expected a file that ends with \.tar, got"):
        files(tmp_path / "*")
    (tmp_path / "x.txt").unlink()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=r"got a compressed one; `gzip -d` decompresses it"):
        files(tmp_path / "*")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["{0..999999999999}", "{0..99999}{0..99999}"])
def test_a_range_of_too_many_names_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match=r"--from: expected ranges of at most 1,000,000 names, got"):
        files(tmp_path / f"{pattern}.tar")


def test_a_range_that_no_data_set_has_is_a_name(tmp_path):
    with pytest.raises(UserError, match=r"which matches none"):
        files(tmp_path / f"{{0..{'9' * 5000}}}.tar")


def test_pipes_and_devices_are_not_inputs(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").symlink_to("/dev/zero")
    for name in ("a.tar", "b.tar", "*.tar"):
        with pytest.raises(UserError, match=r"--from: expected files, got .* which matches none"):
            files(tmp_path / name)
