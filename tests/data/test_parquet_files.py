import itertools
import json
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from moddistill.data import parquet_files, parquet_reader
from moddistill.data.parquet_files import ParquetFile
from moddistill.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a table to a new file and returns its reader."""
    folder, numbers = tmp_path_factory.mktemp("parquet"), itertools.count()

    def write(table, **options):
        path = str(folder / f"{next(numbers)}.parquet")
        if not isinstance(table, bytes):
            pq.write_table(
                table if isinstance(table, pa.Table) else pa.table(table), path, **options
            )
        else:
            (folder / path).write_bytes(table)
        return ParquetFile(path)

    return write


@pytest.fixture(params=["small groups", "large groups"])
def size_of_groups(request, monkeypatch):
    """Makes the reader treat all row groups as small or as large ones."""
    if request.param == "large groups":
        monkeypatch.setattr(parquet_files, "_CACHED_GROUP", 0)
        monkeypatch.setattr(parquet_files, "_BATCH", 500)  # bytes, so that there are several


def content(file):
    """Returns the bytes of a file."""
    with open(file.path, "rb") as opened:
        return opened.read()


def read_places(file):
    """Returns (line, fields or reason) of all rows, each read by itself."""
    rows = []
    for block in file.blocks():
        for offset, size, line in zip(*(column.tolist() for column in block.places), strict=True):
            try:
                rows.append((line, file.read(offset, size)))
            except UserError as error:
                rows.append((line, str(error)))
    return rows


def read_blocks(file):
    """Returns (line, fields or reason) of all rows, as an index sees them."""
    rows = []
    for block in file.blocks():
        for line, fields in zip(block.places.line.tolist(), block.read(), strict=True):
            rows.append((line, str(fields) if isinstance(fields, UserError) else fields))
        assert block.end == rows[-1][0]
    assert len(rows) == file.extent()
    return rows


def images(count, size=1000):
    return [{"bytes": random.Random(n).randbytes(size), "path": f"{n}.png"} for n in range(count)]


@pytest.mark.usefixtures("size_of_groups")
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_each_row_is_read_by_itself(write, row_group_size):
    table = {"image": images(50), "question": [f"q{n}" for n in range(50)]}
    file = write(pa.table(table), row_group_size=row_group_size)
    expected = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    assert read_places(file) == list(enumerate(expected, 1))


def test_blocks_have_no_bytes_of_images(write):
    file = write({"image": images(3), "images": [images(2)] * 3, "text": ["a", "b", None]})
    marked = [{"bytes": b"-", "path": f"{n}.png"} for n in range(3)]
    assert [fields for _, fields in read_blocks(file)] == [
        {"image": marked[0], "images": marked[:2], "text": "a"},
        {"image": marked[1], "images": marked[:2], "text": "b"},
        {"image": marked[2], "images": marked[:2], "text": None},
    ]


def test_blocks_do_not_read_bytes_of_images_from_the_disk(write, monkeypatch):
    monkeypatch.setattr(parquet_files, "check_footer", lambda _: None)  # a process reads modules
    file = write({"image": images(100, size=100_000), "text": ["a"] * 100})

    def bytes_read():
        with open("/proc/self/io") as lines:
            return int(next(lines).split()[1])

    before = bytes_read()
    [block] = file.blocks()  # and they do not count
    assert len(block.read()) == 100
    assert bytes_read() - before < 1_000_000
    read_places(file)
    assert bytes_read() - before > 10_000_000


@pytest.mark.usefixtures("size_of_groups")
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (IMAGE, [None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}]),
        (IMAGE, [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": "b.png"}]),
        (pa.list_(IMAGE), [None, [], [None], [{"bytes": b"x", "path": "a"}]]),
        (pa.struct([("bytes", pa.binary())]), [{"bytes": b"x"}, {"bytes": None}, None]),
        (pa.binary(), [b"x", b"", None]),
        (pa.large_binary(), [b"x", None]),
        (pa.list_(pa.binary()), [[b"x", b"y"], [], None]),
        (pa.large_list(pa.large_string()), [["a", "b"], None]),
        (pa.large_string(), ["a", "狗", None]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a", None]),
        (
            pa.list_(pa.struct([("type", pa.string()), ("image", IMAGE)])),
            [[{"type": "image", "image": {"bytes": b"x", "path": "a"}}], []],
        ),
        (pa.map_(pa.string(), pa.int64()), [[("a", 1)], []]),
        (pa.float64(), [0.5, None]),
    ],
    ids=str,
)
def test_values_are_the_same_in_blocks_and_by_themselves(write, kind, values):
    """Images of a column with nulls have their bytes, so that it is known which there are."""
    table = pa.table({"id": list(range(len(values))), "x": pa.array(values, kind)})
    file = write(table)
    expected = [(n + 1, {"id": n, "x": value}) for n, value in enumerate(values)]
    assert read_blocks(file) == expected
    assert read_places(file) == expected


def test_images_are_known_by_their_type_whatever_their_column_and_metadata(write):
    features = {"info": {"features": {"scan": {"_type": "Image"}, "bytes": {"dtype": "string"}}}}
    table = pa.table(
        {"scan": pa.array(images(2), IMAGE), "bytes": ["a", "b"], "a.path": ["c", "d"]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    assert read_blocks(write(table)) == [
        (1, {"scan": {"bytes": b"-", "path": "0.png"}, "bytes": "a", "a.path": "c"}),
        (2, {"scan": {"bytes": b"-", "path": "1.png"}, "bytes": "b", "a.path": "d"}),
    ]


def test_blocks_are_bounded_in_bytes_and_rows(write, monkeypatch):
    file = write({"text": ["x"] * 5000})
    assert [len(block.places) for block in file.blocks()] == [2048, 2048, 904]
    monkeypatch.setattr(parquet_files, "_BATCH", 11_000)
    file = write({"picture": [os.urandom(3000) for _ in range(10)]}, use_dictionary=False)
    assert [len(block.places) for block in file.blocks()] == [3, 3, 3, 1]
    file = write({"picture": [os.urandom(30_000) for _ in range(3)]})
    assert [len(block.places) for block in file.blocks()] == [1, 1, 1]


def test_a_group_is_as_large_as_its_rows_in_memory(write, monkeypatch):
    """A value that repeats is stored once, and read once for each row."""
    monkeypatch.setattr(parquet_files, "_CACHED_GROUP", 100_000)
    monkeypatch.setattr(parquet_files, "_BATCH", 10_000)
    parquet_files._row_group.cache_clear()
    for count, cached in ((200, 0), (50, 1)):
        file = write({"image": pa.array(images(1) * count, IMAGE)})
        assert file._reader().metadata.row_group(0).total_byte_size < 4000
        assert file.read(0, count - 1) == {"image": images(1)[0]}
        assert parquet_files._row_group.cache_info().currsize == cached
    file = write({"text": ["x" * 1000] * 20})
    assert [len(block.places) for block in file.blocks()] == [9, 9, 2]


def test_a_table_may_be_empty(write):
    file = write({"text": pa.array([], pa.string())})
    assert (file.extent(), list(file.blocks())) == (0, [])


@pytest.mark.parametrize("cut", [0, 3, 8, 100, 1000, -1, -4, -100])
def test_a_file_cut_at_its_end_is_an_error_that_names_it(write, cut):
    whole = content(write({"image": images(10)}))
    file = write(whole[:cut])
    for read in (file.extent, lambda: next(file.blocks()), lambda: file.read(0, 0)):
        with pytest.raises(UserError, match=r"\d\.parquet: expected a parquet file, got an err"):
            read()


class Kms(encryption.KmsClient):
    """Keys of keys, not encrypted."""

    def wrap_key(self, key_bytes, _):
        return key_bytes.hex()

    def unwrap_key(self, wrapped_key, _):
        return bytes.fromhex(wrapped_key)


def test_an_encrypted_file_is_an_error_that_names_it(write):
    factory = encryption.CryptoFactory(lambda _: Kms())
    config = encryption.EncryptionConfiguration(footer_key="key", uniform_encryption=True)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    file = write({"text": ["a"]}, encryption_properties=properties)
    with pytest.raises(UserError, match=r"\d\.parquet: expected a parquet file, got .*crypt"):
        file.extent()


def test_damage_that_ends_the_process_of_pyarrow_is_an_error(write, monkeypatch):
    """Found by mutation: an exception of C++, in the metadata of a column."""
    file = write({"text": ["a"]})
    monkeypatch.setattr(parquet_reader, "_READ_FOOTER", "import os; os.abort()")
    with pytest.raises(UserError, match=rf"^{file.path}: expected a parquet file, got an error: "):
        list(file.blocks())


def test_two_columns_of_one_name_are_an_error_that_names_the_file(write):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    with pytest.raises(UserError, match=r"\d\.parquet: expected columns of different names"):
        write(table).extent()


@pytest.mark.usefixtures("size_of_groups")
def test_the_rows_of_a_damaged_row_group_are_rejected_and_no_others(write):
    texts = [f"{n} " * 500 for n in range(30)]
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    whole = write(pa.table({"text": texts}), write_page_checksum=True, **options)
    damaged = content(whole).replace(b"15 15 15", b"15 15 16", 1)
    for read in (read_blocks, read_places):
        rows = read(write(damaged))
        assert [line for line, _ in rows] == list(range(1, 31))
        for line, row in rows:
            if 11 <= line <= 20:
                assert row.startswith("row: expected a readable row group, got an error: ")
                assert len(row) < 600
                assert row.isprintable()
            else:
                assert row == {"text": texts[line - 1]}


@pytest.mark.usefixtures("size_of_groups")
def test_a_row_that_is_not_utf8_is_rejected_by_itself(write):
    texts = pa.array([b"good", b"bad \xff\n", b"better"]).view(pa.string())
    file = write({"text": texts})
    for read in (read_blocks, read_places):
        assert read(file) == [
            (1, {"text": "good"}),
            (
                2,
                "row: expected values of Python, got an error: 'utf-8' codec can't decode byte "
                "0xff in position 4: invalid start byte",
            ),
            (3, {"text": "better"}),
        ]


@pytest.mark.usefixtures("size_of_groups")
def test_a_damaged_page_is_rejected_or_is_what_was_written(write):
    texts = [f"text {n}" for n in range(20)]
    options = {"row_group_size": 5, "compression": "none", "write_page_checksum": True}
    whole = content(write(pa.table({"image": images(20, size=50), "text": texts}), **options))
    end_of_pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    draw, rejected = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8])):
            damaged[draw.randrange(4, end_of_pages)] = draw.randrange(256)
        file = write(bytes(damaged))
        for rows in (read_blocks(file), read_places(file)):
            assert [line for line, _ in rows] == list(range(1, 21))
            bad = [row for _, row in rows if isinstance(row, str)]
            good = [row["text"] for _, row in rows if not isinstance(row, str)]
            assert all(row.startswith("row: expected ") and len(row) < 600 for row in bad)
            assert set(good) <= set(texts)
            rejected += len(bad)
        os.unlink(file.path)
    assert rejected > 1000


@pytest.mark.usefixtures("size_of_groups")
def test_a_row_that_does_not_exist_is_an_error(write):
    with pytest.raises(UserError, match="row: expected "):
        write({"text": ["a", "b"]}).read(0, 2)


@pytest.mark.usefixtures("size_of_groups")
def test_threads_share_a_file(write):
    file = write({"image": images(200), "text": list(map(str, range(200)))}, row_group_size=20)
    places = [(n // 20, n % 20) for n in range(200)]
    random.Random(0).shuffle(places)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda place: file.read(*place), places))
    assert [row["text"] for row in rows] == [str(20 * group + row) for group, row in places]
    assert all(row["image"]["path"] == f"{row['text']}.png" for row in rows)


def test_many_files_share_few_open_readers(write):
    files = [write({"text": [str(n)]}) for n in range(80)]
    files[0].close()
    before = len(os.listdir("/proc/self/fd"))
    assert [file.read(0, 0)["text"] for file in files] == [str(n) for n in range(80)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    files[0].close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_are_pickled_as_their_path(write):
    file = write({"text": ["a"]})
    assert file.extent() == 1
    assert pickle.loads(pickle.dumps(file)).read(0, 0) == {"text": "a"}


def test_without_pyarrow_the_error_says_how_to_install_it(write, monkeypatch):
    file = write({"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"parquet: expected pyarrow, .*moddistill\[parquet\]"):
        file.extent()
