"""Members of zip and tar archives: hostile ones are one rejected record each."""

import io
import os
import stat
import struct
import tarfile
import zipfile

import pytest

from moddistill.errors import UserError
from moddistill.prepare.archives import Archive, index_archive, normalize
from moddistill.prepare.tar_members import list_tar
from moddistill.prepare.zip_members import list_zip
from tests.prepare.conftest import write_tar, write_zip


def open_zip(path):
    index_archive(list_zip(str(path)), path.with_suffix(".npy"))
    return Archive(str(path), str(path.with_suffix(".npy")))


def open_tar(path):
    index_archive(list_tar(str(path)), path.with_suffix(".npy"))
    return Archive(str(path), str(path.with_suffix(".npy")))


def read(archive, name):
    return archive.read(archive.find(name))


def info(name, kind, **fields):
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_are_read_by_name(tmp_path, compression):
    files = {f"folder/{i}.bin": os.urandom(i * 1000) + b"\0" * i * 3000 for i in range(50)}
    path = tmp_path / "a.zip"
    write_zip(path, files.items(), compression=compression)
    archive = open_zip(path)
    assert {name: read(archive, name) for name in files} == files
    assert archive.find("folder/50.bin") is None
    assert archive.find("folder") is None


def test_large_zip_members_are_inflated_in_pieces(tmp_path):
    data = os.urandom(100_000) + bytes(5_000_000)
    path = tmp_path / "a.zip"
    write_zip(path, [("x", data)], compression=zipfile.ZIP_DEFLATED)
    archive = open_zip(path)
    pieces = list(archive.pieces(archive.find("x")))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 2**20


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_read_by_name(tmp_path, form):
    files = {f"./folder/{'x' * i}": os.urandom(i * 100) for i in range(1, 150, 29)}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        archive.addfile(info("folder/", tarfile.DIRTYPE))
        for name, data in files.items():
            archive.addfile(info(name, tarfile.REGTYPE, size=len(data)), io.BytesIO(data))
    archive = open_tar(path)
    assert {name: read(archive, normalize(name)) for name in files} == files
    assert archive.find("folder") is None


def test_names_of_the_records_in_an_archive_are_returned(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a/x.json", "[]"), ("y.JSONL", ""), ("z.png", b"")])
    assert index_archive(list_zip(path), tmp_path / "a.npy") == ["a/x.json", "y.JSONL"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\..\\x", "\\x", "", ".", "a\0b"])
def test_names_that_lead_outside_are_refused(name):
    with pytest.raises(UserError, match=r"expected one inside of its folder or archive"):
        normalize(name)


def test_plain_parts_of_names_are_removed():
    assert normalize("./a//b/./c.png") == "a/b/c.png"
    assert normalize("a..b/c") == "a..b/c"


def test_a_zip_member_that_leads_outside_is_not_read(tmp_path):
    write_zip(tmp_path / "a.zip", [("../x.png", b"1"), ("x.png", b"2")])
    archive = open_zip(tmp_path / "a.zip")
    assert read(archive, "x.png") == b"2"
    with pytest.raises(UserError, match="got a name that leads out of the archive"):
        read(archive, "../x.png")


def test_duplicate_members_are_not_read(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "a.zip", [("x", b"1"), ("y", b"2"), ("x", b"3")])
    archive = open_zip(tmp_path / "a.zip")
    assert read(archive, "y") == b"2"
    with pytest.raises(UserError, match="got several members of this name"):
        read(archive, "x")
    write_tar(tmp_path / "a.tar", [("x", b"1"), ("./x", b"1")])
    with pytest.raises(UserError, match="got several members of this name"):
        read(open_tar(tmp_path / "a.tar"), "x")


@pytest.mark.parametrize(
    ("mode", "fault"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "a device, pipe or sparse file")]
)
def test_special_zip_members_are_not_read(tmp_path, mode, fault):
    special = zipfile.ZipInfo("x")
    special.external_attr = (mode | 0o777) << 16
    write_zip(tmp_path / "a.zip", [(special, "/etc/passwd")])
    with pytest.raises(UserError, match=f"got {fault}"):
        read(open_zip(tmp_path / "a.zip"), "x")


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device, pipe or sparse file"),
        (tarfile.FIFOTYPE, "a device, pipe or sparse file"),
    ],
)
def test_special_tar_members_are_not_read(tmp_path, kind, fault):
    files = [(info("x", kind, linkname="/etc/passwd"), b""), ("y", b"1")]
    write_tar(tmp_path / "a.tar", files)
    archive = open_tar(tmp_path / "a.tar")
    assert read(archive, "y") == b"1"
    with pytest.raises(UserError, match=f"got {fault}"):
        read(archive, "x")


def test_encrypted_zip_members_are_not_read(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1")])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # flag in the directory
    path.write_bytes(content)
    with pytest.raises(UserError, match="got an encrypted member"):
        read(open_zip(path), "x")


def test_other_compressions_are_not_read(tmp_path):
    write_zip(tmp_path / "a.zip", [("x", b"1")], compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match="got a compression other than deflate"):
        read(open_zip(tmp_path / "a.zip"), "x")


def with_declared_size(path, size):
    """Changes the uncompressed size of the only member in the directory of a zip."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 24, size)
    path.write_bytes(content)


def test_a_zip_bomb_is_inflated_to_its_declared_size_at_most(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"\0" * 100_000_000)], compression=zipfile.ZIP_DEFLATED)
    with_declared_size(path, 1000)
    archive = open_zip(path)
    pieces = []
    with pytest.raises(UserError, match=r"expected 1,000 bytes, as the archive notes, got more"):
        pieces.extend(archive.pieces(archive.find("x")))
    assert pieces == []


def test_a_member_that_declares_more_than_an_image_has_is_not_inflated(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1")])
    with_declared_size(path, 2**31)
    with pytest.raises(UserError, match=r"expected at most 268,435,456 bytes, got 2,147,483,648"):
        read(open_zip(path), "x")


def test_a_member_that_is_shorter_than_declared_is_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1" * 100)], compression=zipfile.ZIP_DEFLATED)
    with_declared_size(path, 1000)
    with pytest.raises(UserError, match=r"expected 1,000 bytes, as the archive notes, got 100"):
        read(open_zip(path), "x")


def test_a_damaged_zip_member_is_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"12345678"), ("y", b"good")])
    path.write_bytes(path.read_bytes().replace(b"12345678", b"12345679"))
    archive = open_zip(path)
    assert read(archive, "y") == b"good"
    with pytest.raises(UserError, match="expected an undamaged member, got another CRC-32"):
        read(archive, "x")


def test_a_damaged_deflate_stream_is_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", os.urandom(100))], compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[31] = 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected an undamaged member"):
        read(open_zip(path), "x")


def test_a_member_without_a_local_header_is_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1")])
    content = path.read_bytes()
    path.write_bytes(b"XX" + content[2:])
    with pytest.raises(UserError, match="expected a local header, got other bytes"):
        read(open_zip(path), "x")


def test_a_zip_member_beyond_the_end_of_the_archive_is_not_read(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1"), ("y", b"2")])
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 20, 1000)  # stored bytes
    path.write_bytes(content)
    archive = open_zip(path)
    assert read(archive, "y") == b"2"
    with pytest.raises(UserError, match="got a member that ends after the archive"):
        read(archive, "x")


def test_a_zip_without_its_beginning_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, [("x", b"1" * 100), ("y", b"2" * 100)])
    path.write_bytes(path.read_bytes()[50:])
    with pytest.raises(UserError, match="expected an entire zip archive"):
        open_zip(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4" + b"\0" * 100])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="expected a zip archive, got an error"):
        open_zip(tmp_path / "a.zip")


@pytest.mark.parametrize("content", [b"text", b"text" * 500])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="expected a tar archive, got an error"):
        open_tar(tmp_path / "a.tar")
