import json
import sys
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moddistill.config import DataConfig, SourceConfig
from moddistill.data import parquet_files
from moddistill.data.pipeline import warn_of_slow_files
from moddistill.errors import UserError
from moddistill.models.batch import PreferenceBatch, make_batch
from tests.data.streams import LENGTH, take


def test_batches_are_stacked_rows(stream, data_config, numbered):
    batch = next(stream(data_config(numbered(10)), batch_size=3))
    expected = make_batch(np.zeros, rows=3, length=LENGTH, images=(3, 4))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, expected)


def test_preference_batches_have_two_sides(stream, data_config, data_file):
    path = data_file([{"question": "q", "chosen": "a", "rejected": "b"}])
    batch = next(stream(data_config(path), kind="preference", batch_size=2))
    assert isinstance(batch, PreferenceBatch)
    assert batch.chosen.tokens.shape == batch.rejected.loss_mask.shape == (2, LENGTH)
    assert batch.chosen.images is batch.rejected.images is None
    assert batch.images.shape == (2, 3, 4, 4, 3)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_holds_each_record_once_in_another_order(
    packing, stream, data_config, numbered, answers
):
    batches = stream(data_config(numbered(12), packing=packing), batch_size=1)
    rows = batches._maker.plan.rows_of(1)
    assert rows < 12 if packing else rows == 12
    epochs = [sum(answers(*take(batches, rows)), ()) for _ in range(2)]
    assert sorted(epochs[0], key=int) == sorted(epochs[1], key=int) == [str(n) for n in range(12)]
    assert epochs[0] != epochs[1]
    assert list(epochs[0]) != sorted(epochs[0], key=int)


def test_order_depends_only_on_the_seed(stream, data_config, numbered, answers):
    config = data_config(numbered(12))
    orders = [answers(*take(stream(config, seed=seed), 3)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_sources_are_mixed_by_weight(stream, data_config, numbered, answers):
    paths = [numbered(10, "a.json"), numbered(10, "b.json", start=100)]
    batches = stream(data_config(*paths, weights=[3.0, 1.0]), batch_size=1)
    order = sum(answers(*take(batches, batches._maker.plan.rows_of(1))), ())
    assert Counter(int(answer) >= 100 for answer in order) == {False: 30, True: 10}


def test_weights_without_a_record_in_an_epoch_are_refused(stream, data_config, numbered):
    config = data_config(numbered(10), weights=[1e-300])
    with pytest.raises(UserError, match="expected weights with at least one record in an epoch"):
        stream(config)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_the_same_for_any_number_of_processes_and_workers(
    processes, workers, stream, data_config, numbered, answers
):
    paths = [numbered(7, "a.json"), numbered(30, "b.json", start=100)]
    single = answers(*take(stream(data_config(*paths), batch_size=8), 4))
    config = data_config(*paths, workers=workers)
    steps = [[] for _ in range(4)]
    for process in range(processes):
        batches = stream(config, batch_size=8, process=process, processes=processes)
        for step, batch in zip(steps, take(batches, 4), strict=True):
            step += answers(batch)
        batches.close()
    assert [row for step in steps for row in step] == single


def test_position_restores_the_exact_next_batches_with_any_number_of_workers(
    stream, data_config, partly_bad
):
    config = {n: data_config(partly_bad, max_rejected=0.5, workers=n) for n in (0, 2, 3)}
    expected = take(stream(config[0]), 9)
    position, read = 0, []
    for workers in (0, 2, 3, 0):
        batches = stream(config[workers])
        batches.seek(position)
        read += take(batches, 2)
        position = json.loads(json.dumps(batches.next_row))
        batches.close()
    assert position == 8 * 4
    chex.assert_trees_all_equal(read, expected[:8])


def test_position_is_valid_for_another_number_of_processes(stream, data_config, numbered, answers):
    config = data_config(numbered(30))
    expected = answers(*take(stream(config, batch_size=4), 5))
    first = stream(config, batch_size=4, process=1, processes=2)
    take(first, 2)
    second = stream(config, batch_size=4)
    second.seek(first.next_row)
    assert answers(*take(second, 3)) == expected[8:]


def test_position_may_be_set_while_batches_are_made_ahead(stream, data_config, numbered):
    batches = stream(data_config(numbered(30)))
    expected = take(batches, 3)
    batches.seek(4)
    chex.assert_trees_all_equal(take(batches, 2), expected[1:])


def test_order_is_independent_of_the_order_of_sources_in_the_config(stream, numbered, tmp_path):
    paths = {"a": numbered(10, "a.json"), "b": numbered(10, "b.json", start=100)}
    orders = []
    for names in ("ab", "ba"):
        sources = {name: SourceConfig(paths[name], str(tmp_path)) for name in names}
        orders.append(take(stream(DataConfig(sources, max_length=LENGTH)), 4))
    chex.assert_trees_all_equal(*orders)


def test_records_with_images_are_refused_for_a_text_only_model(stream, data_config, numbered):
    config = data_config(numbered(1), numbered(9, "b.json"))
    message = (
        r"^config\.data\.sources\.source1: expected records without images for a model without a "
        r"vision encoder .*--config\.vision=MODEL.*, got images in 4 of 9 records"
    )
    with pytest.raises(ValueError, match=message):
        stream(config, patches=0)


def test_text_only_batches_have_no_images(stream, data_config, numbered):
    assert next(stream(data_config(numbered(1)), patches=0)).images is None


def test_config_without_sources_is_an_error(stream, data_config):
    with pytest.raises(
        ValueError, match=r"^config.data.sources: expected .*NAME.path=FILE.*, got none"
    ):
        stream(data_config())


def test_data_modules_do_not_import_jax_or_torch():
    modules = [name for name in sys.modules if name.startswith("moddistill.data.")]
    assert len(modules) >= 15
    for name in modules:
        source = Path(sys.modules[name].__file__).read_text()
        assert "import jax" not in source
        assert "torch" not in source


def test_slow_parquet_files_are_logged(stream, data_config, tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"], "chosen": ["a"], "rejected": ["b"]}), path)
    sources = stream(data_config(str(path)), kind="preference")._maker.sources
    warn_of_slow_files(sources)
    assert not caplog.records
    monkeypatch.setattr(parquet_files, "_CACHED_GROUP", 100)
    warn_of_slow_files(sources)
    assert f"1 files, such as {path}, have row groups so large" in caplog.text
