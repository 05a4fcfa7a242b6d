import itertools
import os
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from moddistill.data.array_records import (
    ArrayRecordFile,
    pack_record,
    unpack_record,
    writing_records,
)
from moddistill.data.image_files import EmbeddedImage
from moddistill.errors import UserError

BOUNDED = settings(max_examples=150, derandomize=True, deadline=None)
FIELDS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes records to a new file and returns its reader."""
    folder, numbers = tmp_path_factory.mktemp("array_record"), itertools.count()

    def write(records, options="group_size:1"):
        path = str(folder / f"{next(numbers)}.array_record")
        if isinstance(records, bytes):
            with open(path, "wb") as file:
                file.write(records)
        else:
            writer = ArrayRecordWriter(path, options)
            for record in records:
                writer.write(record)
            writer.close()
        return ArrayRecordFile(path)

    return write


def content(file):
    """Returns the bytes of a file."""
    with open(file.path, "rb") as opened:
        return opened.read()


def image(number, size=2000):
    return EmbeddedImage(f"{number}.png", random.Random(number).randbytes(size))


def packed(count):
    return [pack_record({"id": n, "text": f"text {n}"}, [image(n)]) for n in range(count)]


def expected(number):
    fields = {"id": number, "text": f"text {number}"}
    return fields | {"images": [{"path": f"{number}.png", "bytes": image(number).data}]}


@pytest.mark.slow
@BOUNDED
@given(FIELDS, st.lists(st.tuples(st.text(), st.binary())))
def test_what_is_unpacked_is_what_was_packed(fields, images):
    data = pack_record(fields, [EmbeddedImage(*each) for each in images])
    named = {"images": [{"path": name, "bytes": data} for name, data in images]} if images else {}
    fields.pop("images", None)
    assert unpack_record(data) == fields | named


def test_whatever_json_can_spell_is_packed_and_images_without_bytes_are_left_out():
    fields = {"text": "\ud800", "score": float("inf"), "images": ["a.png"]}
    assert unpack_record(pack_record(fields, [])) == {"text": "\ud800", "score": float("inf")}


def test_the_bytes_are_as_documented():
    data = pack_record({"id": "狗", "images": "replaced"}, [EmbeddedImage("a", b"\0\1")])
    header = '{"id": "狗", "images": [{"path": "a", "size": 2}]}'.encode()
    assert data == b"MDR1" + len(header).to_bytes(4, "little") + header + b"\0\1"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "record: expected bytes that begin with b'MDR1', got b''"),
        (b"MDR1\0\0\0", "record: expected bytes that begin with b'MDR1', got b'MDR1'"),
        (b"\x89PNG\0\0\0\0", r"record: expected bytes that begin with b'MDR1', got b'\\x89PNG'"),
        (b"MDR1\0\0\0\0", "record: expected a header in JSON, got an error: Expecting value"),
        (b"MDR1\xff\xff\xff\xff{}", "record: expected 4294967303 bytes, got 10"),
        (b"MDR1\1\0\0\0\xff", "record: expected a header in JSON, got an error: 'utf-8' codec"),
        (b"MDR1\2\0\0\0[]", "record: expected a header in JSON, got an error: 'list' object"),
        (b"MDR1\2\0\0\0{}x", "record: expected 10 bytes, got 11"),
    ],
)
def test_other_bytes_are_rejected(data, reason):
    with pytest.raises(UserError, match=reason):
        unpack_record(data)


@pytest.mark.parametrize(
    "images", ["3", '"a"', "[3]", "[{}]", "null", '[{"path": "a", "size": "1"}]', "[[]]"]
)
def test_a_header_without_sizes_of_images_is_rejected(images):
    header = f'{{"images": {images}}}'.encode()
    with pytest.raises(UserError, match="record: expected a header in JSON, got an error: "):
        unpack_record(b"MDR1" + len(header).to_bytes(4, "little") + header)


@pytest.mark.parametrize("sizes", [(3,), (4, -1), (-1, 5), (4, 0.0), (10**30,)])
def test_a_header_with_wrong_sizes_of_images_is_rejected(sizes):
    data = pack_record({"x": 1}, [EmbeddedImage("a", b"1234")] + [EmbeddedImage("b", b"")])
    fields = unpack_record(data)
    assert [each["bytes"] for each in fields["images"]] == [b"1234", b""]
    listed = ", ".join(f'{{"path": "a", "size": {size}}}' for size in sizes)
    header = f'{{"images": [{listed}]}}'.encode()
    with pytest.raises(UserError, match="record: expected "):
        unpack_record(b"MDR1" + len(header).to_bytes(4, "little") + header + b"1234")


@BOUNDED
@given(st.data())
def test_damaged_bytes_are_rejected_or_are_another_record(data):
    damaged = bytearray(pack_record({"id": 1, "text": "x"}, [image(1, size=20)]))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(unpack_record(bytes(damaged)), dict)
    except UserError as error:
        assert len(str(error)) < 600
        assert str(error).isprintable()


def test_records_are_read_by_number(write):
    file = write(packed(10))
    assert file.extent() == 10
    assert [file.read(number, 0) for number in (7, 0, 9)] == [expected(n) for n in (7, 0, 9)]
    with pytest.raises(UserError, match=r"record: expected undamaged bytes, got .* out of bound"):
        file.read(10, 0)


def test_blocks_have_no_bytes_of_images(write):
    empty = pack_record({"id": 2}, [EmbeddedImage("e", b"")])
    [block] = write([*packed(2), empty, pack_record({"id": 3}, [])]).blocks()
    marked = [{"images": [{"path": f"{n}.png", "bytes": b"-"}]} for n in range(2)]
    assert block.read() == [
        {"id": 0, "text": "text 0"} | marked[0],
        {"id": 1, "text": "text 1"} | marked[1],
        {"id": 2, "images": [{"path": "e", "bytes": b""}]},
        {"id": 3},
    ]
    assert (block.places.line.tolist(), block.end) == ([1, 2, 3, 4], 4)


def test_blocks_are_bounded(write):
    records = [pack_record({"id": n}, []) for n in range(5000)]
    blocks = list(write(records, "group_size:100").blocks())
    assert [(len(block.places), block.end) for block in blocks] == [
        (2048, 2048),
        (2048, 4096),
        (904, 5000),
    ]
    assert [fields["id"] for block in blocks for fields in block.read()] == list(range(5000))
    assert list(write([]).blocks()) == []


def test_a_damaged_chunk_is_one_rejected_record(write):
    whole = content(write(packed(100)))
    place = whole.index(image(58).data[:100])
    file = write(whole[:place] + b"\0" * 50 + whole[place + 50 :])
    [block] = file.blocks()
    for number, fields in enumerate(block.read()):
        if number == 58:
            assert re.match("record: expected undamaged bytes, got an error: Corr", str(fields))
            assert len(str(fields)) < 600
        else:
            assert fields["text"] == f"text {number}"
            assert file.read(number, 0) == expected(number)


@pytest.mark.parametrize("cut", [0, 10, 65536, 131072, 200_000, -1, -65536])
def test_a_file_cut_at_its_end_is_an_error_that_names_it(write, cut):
    file = write(content(write(packed(100)))[:cut])
    for read in (file.extent, lambda: next(file.blocks()), lambda: file.read(0, 0)):
        with pytest.raises(UserError, match=r"\d\.array_record: expected a whole ArrayRecord fil"):
            read()


def test_readers_can_be_pickled_closed_and_shared_by_threads(write):
    file = write(packed(50))
    numbers = [random.Random(0).randrange(50) for _ in range(400)]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda number: file.read(number, 0), numbers))
    assert rows == [expected(number) for number in numbers]
    file.close()
    assert pickle.loads(pickle.dumps(file)).read(3, 0) == file.read(3, 0) == expected(3)


def test_many_files_share_few_open_readers(write):
    files = [write(packed(1)) for _ in range(80)]
    files[0].close()
    before = len(os.listdir("/proc/self/fd"))
    assert all(file.read(0, 0) == expected(0) for file in files)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    files[0].close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_without_space_is_an_error(tmp_path):
    full = pytest.raises(UserError, match="expected a disk with enough space, got open")
    with full, writing_records(tmp_path / "missing/x.array_record") as write:
        write(b"1")
