import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moddistill.data import parquet_reader
from moddistill.data.parquet_reader import open_reader
from moddistill.errors import UserError


def test_a_row_group_that_inflates_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_reader, "_LARGEST_GROUP", 2**16)
    path, table = str(tmp_path / "a.parquet"), pa.table({"question": ["x" * 2**22]})
    pq.write_table(table, path, compression="zstd")
    with pytest.raises(UserError, match=r"expected a row group of at most [\d,]+ bytes, got 4,19"):
        open_reader(path)
    pq.write_table(table, path, compression="none")
    assert open_reader(path).read().equals(table)
