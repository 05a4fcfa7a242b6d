import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moddistill.data.places import Places
from moddistill.prepare.parquet_rows import ParquetRecords
from tests.prepare.conftest import image, read_rejected, read_shards, write_zip

RED, BLUE = image((255, 0, 0)), image((0, 0, 255))


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_rlaif_v_becomes_preference_pairs(tmp_path, prepare):
    rows = [
        {
            "ds_name": "RLAIF-V", "image": {"bytes": RED, "path": "1.png"}, "question": "What?",
            "chosen": "A dog.", "rejected": "A cat.", "origin_dataset": "x", "idx": 7,
            "origin_split": "{}", "image_path": "RLAIF-V/1.png",
        }
    ]  # fmt: skip
    [pair] = read_shards(prepare("parquet", "--from", write(tmp_path / "a.parquet", rows)))
    assert pair["conversations"] == [{"from": "human", "value": "<image>\nWhat?"}]
    assert (pair["chosen"], pair["rejected"]) == ("A dog.", "A cat.")
    assert pair["images"] == [{"path": "1.png", "bytes": RED}]


def test_finevision_becomes_conversations(tmp_path, prepare):
    rows = [
        {
            "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}],
            "texts": [{"user": "Which?", "assistant": "1."}, {"user": "?", "assistant": "x"}],
            "source": "x", "rating": 0.5,
        }
    ]  # fmt: skip
    [record] = read_shards(prepare("parquet", "--from", write(tmp_path / "a.parquet", rows)))
    assert record["conversations"][0]["value"] == "<image>\n<image>\nWhich?"
    assert len(record["conversations"]) == 4
    assert [each["bytes"] for each in record["images"]] == [RED, BLUE]


def test_columns_of_a_table_are_named_by_flags(tmp_path, prepare):
    archive = write_zip(tmp_path / "a.zip", [("1.png", RED)])
    rows = [{"q": "What?", "a": ["A dog.", "Dog"], "file": "1.png"}]
    flags = ("--columns.question", "q", "--columns.answer", "a", "--columns.image", "file")
    path = write(tmp_path / "a.parquet", rows)
    [record] = read_shards(prepare("parquet", "--from", path, "--images", archive, *flags))
    assert [turn["value"] for turn in record["conversations"]] == ["<image>\nWhat?", "A dog."]


@pytest.mark.parametrize("group", [1, 7, 50, 1000])
def test_any_part_of_the_rows_is_read_in_order(tmp_path, group):
    path = write(tmp_path / "a.parquet", [{"n": i} for i in range(100)], row_group_size=group)
    records = ParquetRecords(str(path))
    places = Places(*map(np.concatenate, zip(*records.places(), strict=True)))
    assert places.line.tolist() == list(range(1, 101))
    for start, stop in ((0, 100), (0, 1), (13, 51), (49, 50), (99, 100), (20, 20)):
        part = Places(*(column[start:stop] for column in places))
        assert [row["n"] for row in records.fields(part)] == list(range(start, stop))


def test_a_damaged_row_group_is_rejected_row_by_row(tmp_path, prepare):
    rows = [{"question": f"What is {i}?", "chosen": "yes", "rejected": "no"} for i in range(60)]
    path = write(
        tmp_path / "a.parquet", rows, row_group_size=20, compression="none", use_dictionary=False
    )
    content = path.read_bytes()
    at = content.index(b"What is 30?")
    path.write_bytes(content[: at - 4] + b"\xff" * 4 + content[at:])  # the length of a text
    folder = prepare("parquet", "--from", path)
    assert len(read_shards(folder)) == 40
    assert [line for line, _ in read_rejected(folder)] == list(range(21, 41))
    assert all("expected a readable row group" in reason for _, reason in read_rejected(folder))


def test_rows_before_the_damage_of_a_row_group_are_read_once(tmp_path, prepare):
    rows = [{"question": f"What is {i}?", "chosen": "yes", "rejected": "no"} for i in range(80)]
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 64}
    path = write(tmp_path / "a.parquet", rows, write_batch_size=4, **options)
    content = path.read_bytes()
    at = content.index(b"What is 60?")
    path.write_bytes(content[: at - 4] + b"\xff" * 4 + content[at:])
    folder = prepare("parquet", "--from", path)
    usable = len(read_shards(folder))
    assert 16 <= usable <= 60
    assert [line for line, _ in read_rejected(folder)] == list(range(usable + 1, 81))


def test_a_row_with_text_that_is_no_utf_8_costs_no_other_row(tmp_path, prepare):
    rows = [{"question": f"What is {i}?", "chosen": "yes", "rejected": "no"} for i in range(5)]
    options = {"compression": "none", "use_dictionary": False}
    path = write(tmp_path / "a.parquet", rows, **options, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"is 3?", b"is \xff?"))
    folder = prepare("parquet", "--from", path)
    assert len(read_shards(folder)) == 4
    [(line, reason)] = read_rejected(folder)
    assert line == 4
    assert "row: expected UTF-8 text" in reason


def test_rows_that_a_file_declares_and_does_not_have_are_rejected(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"n": i} for i in range(20)])
    records = ParquetRecords(str(path))
    [places] = records.places()
    reader = pq.ParquetFile(path)
    monkeypatch.setattr(
        reader,
        "iter_batches",
        lambda *args, **kw: iter(reader.read(["n"]).slice(0, 12).to_batches()),
    )
    monkeypatch.setattr("moddistill.prepare.parquet_rows.open_reader", lambda path: reader)
    found = list(records.fields(places))
    assert found[:12] == [{"n": i} for i in range(12)]
    assert len(found) == 20
    assert all("fewer rows than the file declares" in str(error) for error in found[12:])


def test_a_column_whose_name_is_no_utf_8_is_refused(tmp_path, prepare):
    path = write(tmp_path / "a.parquet", [{"question": "What?"}])
    path.write_bytes(path.read_bytes().replace(b"question", b"\xffuestion"))
    with pytest.raises(SystemExit, match="expected a parquet file, got an error"):
        prepare("parquet", "--from", path)
