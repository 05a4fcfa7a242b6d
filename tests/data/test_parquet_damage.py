"""Damaged parquet files: an error that names the file, or rows that are rejected by themselves."""

import os
import random

import pyarrow as pa
import pytest
from pyarrow.parquet import encryption

from moddistill.data import parquet_reader
from moddistill.errors import UserError
from tests.data.parquet_rows import content, images, read_blocks, read_places


@pytest.mark.parametrize("cut", [0, 3, 8, 100, 1000, -1, -4, -100])
def test_a_file_cut_at_its_end_is_an_error_that_names_it(write_parquet, cut):
    whole = content(write_parquet({"image": images(10)}))
    file = write_parquet(whole[:cut])
    for read in (file.extent, lambda: next(file.blocks()), lambda: file.read(0, 0)):
        with pytest.raises(UserError, match=r"\d\.parquet: expected a parquet file, got an err"):
            read()


class Kms(encryption.KmsClient):
    """Keys of keys, not encrypted."""

    def wrap_key(self, key_bytes, _):
        return key_bytes.hex()

    def unwrap_key(self, wrapped_key, _):
        return bytes.fromhex(wrapped_key)


def test_an_encrypted_file_is_an_error_that_names_it(write_parquet):
    factory = encryption.CryptoFactory(lambda _: Kms())
    config = encryption.EncryptionConfiguration(footer_key="key", uniform_encryption=True)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    file = write_parquet({"text": ["a"]}, encryption_properties=properties)
    with pytest.raises(UserError, match=r"\d\.parquet: expected a parquet file, got .*crypt"):
        file.extent()


def test_damage_that_ends_the_process_of_pyarrow_is_an_error(write_parquet, monkeypatch):
    """Found by mutation: an exception of C++, in the metadata of a column."""
    file = write_parquet({"text": ["a"]})
    monkeypatch.setattr(parquet_reader, "_READ_FOOTER", "import os; os.abort()")
    with pytest.raises(UserError, match=rf"^{file.path}: expected a parquet file, got an error: "):
        list(file.blocks())


def test_two_columns_of_one_name_are_an_error_that_names_the_file(write_parquet):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    with pytest.raises(UserError, match=r"\d\.parquet: expected columns of different names"):
        write_parquet(table).extent()


@pytest.mark.usefixtures("size_of_groups")
def test_the_rows_of_a_damaged_row_group_are_rejected_and_no_others(write_parquet):
    texts = [f"{n} " * 500 for n in range(30)]
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    whole = write_parquet(pa.table({"text": texts}), write_page_checksum=True, **options)
    damaged = content(whole).replace(b"15 15 15", b"15 15 16", 1)
    for read in (read_blocks, read_places):
        rows = read(write_parquet(damaged))
        assert [line for line, _ in rows] == list(range(1, 31))
        for line, row in rows:
            if 11 <= line <= 20:
                assert row.startswith("row: expected a readable row group, got an error: ")
                assert len(row) < 600
                assert row.isprintable()
            else:
                assert row == {"text": texts[line - 1]}


@pytest.mark.usefixtures("size_of_groups")
def test_a_row_that_is_not_utf8_is_rejected_by_itself(write_parquet):
    texts = pa.array([b"good", b"bad \xff\n", b"better"]).view(pa.string())
    file = write_parquet({"text": texts})
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


@pytest.mark.slow
@pytest.mark.usefixtures("size_of_groups")
def test_a_damaged_page_is_rejected_or_is_what_was_written(write_parquet):
    texts = [f"text {n}" for n in range(20)]
    options = {"row_group_size": 5, "compression": "none", "write_page_checksum": True}
    table = pa.table({"image": images(20, size=50), "text": texts})
    whole = content(write_parquet(table, **options))
    end_of_pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    draw, rejected = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8])):
            damaged[draw.randrange(4, end_of_pages)] = draw.randrange(256)
        file = write_parquet(bytes(damaged))
        for rows in (read_blocks(file), read_places(file)):
            assert [line for line, _ in rows] == list(range(1, 21))
            bad = [row for _, row in rows if isinstance(row, str)]
            good = [row["text"] for _, row in rows if not isinstance(row, str)]
            assert all(row.startswith("row: expected ") and len(row) < 600 for row in bad)
            assert set(good) <= set(texts)
            rejected += len(bad)
        os.unlink(file.path)
    assert rejected > 1000
