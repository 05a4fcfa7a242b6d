import json
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from moddistill.data import parquet_files
from moddistill.errors import UserError
from tests.data.parquet_rows import images, read_blocks, read_places

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.usefixtures("size_of_groups")
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_each_row_is_read_by_itself(write_parquet, row_group_size):
    table = {"image": images(50), "question": [f"q{n}" for n in range(50)]}
    file = write_parquet(pa.table(table), row_group_size=row_group_size)
    expected = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    assert read_places(file) == list(enumerate(expected, 1))


def test_blocks_have_no_bytes_of_images(write_parquet):
    file = write_parquet({"image": images(3), "images": [images(2)] * 3, "text": ["a", "b", None]})
    marked = [{"bytes": b"-", "path": f"{n}.png"} for n in range(3)]
    assert [fields for _, fields in read_blocks(file)] == [
        {"image": marked[0], "images": marked[:2], "text": "a"},
        {"image": marked[1], "images": marked[:2], "text": "b"},
        {"image": marked[2], "images": marked[:2], "text": None},
    ]


def test_blocks_do_not_read_bytes_of_images_from_the_disk(write_parquet, monkeypatch):
    monkeypatch.setattr(parquet_files, "check_footer", lambda _: None)  # a process reads modules
    file = write_parquet({"image": images(100, size=100_000), "text": ["a"] * 100})

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
def test_values_are_the_same_in_blocks_and_by_themselves(write_parquet, kind, values):
    """Images of a column with nulls have their bytes, so that it is known which there are."""
    table = pa.table({"id": list(range(len(values))), "x": pa.array(values, kind)})
    file = write_parquet(table)
    expected = [(n + 1, {"id": n, "x": value}) for n, value in enumerate(values)]
    assert read_blocks(file) == expected
    assert read_places(file) == expected


def test_images_are_known_by_their_type_whatever_their_column_and_metadata(write_parquet):
    features = {"info": {"features": {"scan": {"_type": "Image"}, "bytes": {"dtype": "string"}}}}
    table = pa.table(
        {"scan": pa.array(images(2), IMAGE), "bytes": ["a", "b"], "a.path": ["c", "d"]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    assert read_blocks(write_parquet(table)) == [
        (1, {"scan": {"bytes": b"-", "path": "0.png"}, "bytes": "a", "a.path": "c"}),
        (2, {"scan": {"bytes": b"-", "path": "1.png"}, "bytes": "b", "a.path": "d"}),
    ]


def test_blocks_are_bounded_in_bytes_and_rows(write_parquet, monkeypatch):
    file = write_parquet({"text": ["x"] * 5000})
    assert [len(block.places) for block in file.blocks()] == [2048, 2048, 904]
    monkeypatch.setattr(parquet_files, "_BATCH", 11_000)
    file = write_parquet({"picture": [os.urandom(3000) for _ in range(10)]}, use_dictionary=False)
    assert [len(block.places) for block in file.blocks()] == [3, 3, 3, 1]
    file = write_parquet({"picture": [os.urandom(30_000) for _ in range(3)]})
    assert [len(block.places) for block in file.blocks()] == [1, 1, 1]


def test_a_group_is_as_large_as_its_rows_in_memory(write_parquet, monkeypatch):
    """A value that repeats is stored once, and read once for each row."""
    monkeypatch.setattr(parquet_files, "_CACHED_GROUP", 100_000)
    monkeypatch.setattr(parquet_files, "_BATCH", 10_000)
    parquet_files._row_group.cache_clear()
    for count, cached in ((200, 0), (50, 1)):
        file = write_parquet({"image": pa.array(images(1) * count, IMAGE)})
        assert file._reader().metadata.row_group(0).total_byte_size < 4000
        assert file.read(0, count - 1) == {"image": images(1)[0]}
        assert parquet_files._row_group.cache_info().currsize == cached
    file = write_parquet({"text": ["x" * 1000] * 20})
    assert [len(block.places) for block in file.blocks()] == [9, 9, 2]


def test_a_table_may_be_empty(write_parquet):
    file = write_parquet({"text": pa.array([], pa.string())})
    assert (file.extent(), list(file.blocks())) == (0, [])


@pytest.mark.usefixtures("size_of_groups")
def test_a_row_that_does_not_exist_is_an_error(write_parquet):
    with pytest.raises(UserError, match="row: expected "):
        write_parquet({"text": ["a", "b"]}).read(0, 2)


@pytest.mark.usefixtures("size_of_groups")
def test_threads_share_a_file(write_parquet):
    table = {"image": images(200), "text": list(map(str, range(200)))}
    file = write_parquet(table, row_group_size=20)
    places = [(n // 20, n % 20) for n in range(200)]
    random.Random(0).shuffle(places)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda place: file.read(*place), places))
    assert [row["text"] for row in rows] == [str(20 * group + row) for group, row in places]
    assert all(row["image"]["path"] == f"{row['text']}.png" for row in rows)


def test_many_files_share_few_open_readers(write_parquet):
    files = [write_parquet({"text": [str(n)]}) for n in range(80)]
    files[0].close()
    before = len(os.listdir("/proc/self/fd"))
    assert [file.read(0, 0)["text"] for file in files] == [str(n) for n in range(80)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    files[0].close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_are_pickled_as_their_path(write_parquet):
    file = write_parquet({"text": ["a"]})
    assert file.extent() == 1
    assert pickle.loads(pickle.dumps(file)).read(0, 0) == {"text": "a"}


def test_without_pyarrow_the_error_says_how_to_install_it(write_parquet, monkeypatch):
    file = write_parquet({"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"parquet: expected pyarrow, .*moddistill\[parquet\]"):
        file.extent()
