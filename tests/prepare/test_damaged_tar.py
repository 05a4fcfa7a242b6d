"""Tar archives that cannot be read as a whole."""

import struct
import tarfile

import pytest

from moddistill.errors import UserError
from moddistill.prepare.archives import Archive, Member, index_archive
from moddistill.prepare.tar_members import list_tar
from moddistill.prepare.zip_members import list_zip
from tests.prepare.conftest import write_tar


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


@pytest.mark.parametrize(("mode", "command"), [("w:gz", "gzip -d"), ("w:xz", "xz -d")])
def test_a_compressed_tar_is_refused_with_the_command_that_decompresses_it(tmp_path, mode, command):
    tarfile.open(tmp_path / "a.tar", mode).close()
    with pytest.raises(UserError, match=f"got a compressed one; `{command}` decompresses it"):
        open_tar(tmp_path / "a.tar")


def test_a_tar_with_a_damaged_header_is_refused_instead_of_read_in_part(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [(name, b"1") for name in "abc"])
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 1  # within the checksum of the second header
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"expected a header of a member at byte 1,024"):
        open_tar(path)


def test_a_truncated_tar_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a", b"1" * 5000), ("b", b"2" * 5000)])
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(UserError, match="unexpected end of data"):
        open_tar(path)


def test_a_tar_may_end_without_zeros(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a", b"1" * 512)])
    path.write_bytes(path.read_bytes()[:1024])
    assert read(open_tar(path), "a") == b"1" * 512


def test_a_tar_of_many_members_has_no_bound_on_all_headers(tmp_path):
    write_tar(tmp_path / "a.tar", [(str(i), b"%d" % i) for i in range(3000)])
    assert read(open_tar(tmp_path / "a.tar"), "2999") == b"2999"


def header_with_size(size):
    """A header whose size is a base-256 number, which may be negative."""
    header = bytearray(info("x", tarfile.REGTYPE).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_tar_member_of_negative_size_does_not_repeat_forever(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header_with_size(-512) * 4)
    with pytest.raises(UserError, match=r"got an error: a member of -512 bytes"):
        open_tar(path)


def test_an_extended_header_is_not_read_beyond_a_bound(tmp_path):
    long_name = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2**33)
    (tmp_path / "a.tar").write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + b"x" * 2**21)
    with pytest.raises(UserError, match=r"headers of one member with 8,589,934,592 bytes more"):
        open_tar(tmp_path / "a.tar")


def test_a_chain_of_extended_headers_is_an_error(tmp_path):
    link = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes((link + b"x".ljust(512, b"\0")) * 3000)
    with pytest.raises(UserError, match="expected a tar archive, got an error"):
        open_tar(tmp_path / "a.tar")


def test_members_with_equal_hashes_are_refused_as_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("moddistill.prepare.archives._key", lambda name: 7)
    members = [Member("a", 0, 1, 1), Member("b", 1, 1, 1)]
    index_archive(members, tmp_path / "a.npy")
    (tmp_path / "a.tar").write_bytes(b"12")
    archive = Archive(str(tmp_path / "a.tar"), str(tmp_path / "a.npy"))
    with pytest.raises(UserError, match="several members of this name"):
        read(archive, "a")
