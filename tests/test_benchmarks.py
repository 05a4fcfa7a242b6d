import time

import numpy as np
import pytest

from benchmarks import (
    convert,
    data_index,
    data_loading,
    data_parquet,
    digests,
    efficiency,
    kd_step,
    teacher_cache,
    vision_tower,
)
from benchmarks.head_to_head import check_agreement, compare
from moddistill.config import ExpertConfig
from moddistill.convert.sources import open_source
from moddistill.models.flops import parameter_counts
from moddistill.models.limits import check_architecture
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from tests import torch_or_skip

MIB = 2**20


def make_files(folder):
    (folder / "size").write_text(str(64 * MIB))


def prepare_nothing(_):
    return lambda: {"size": 64.0}


def prepare_slow_and_large(folder):
    size = int((folder / "size").read_text())

    def run():
        time.sleep(0.02)
        return {"size": np.ones(size, np.uint8).sum() / MIB, "other": 1.0}

    return run


SIDES = {"nothing": prepare_nothing, "slow": prepare_slow_and_large}


def test_time_and_memory_of_each_side_are_measured():
    result = compare("tests.test_benchmarks", rounds=3)
    assert result["nothing"]["seconds"] < 0.02 < result["slow"]["seconds"]
    assert result["slow"]["working_bytes"] > 60 * MIB
    assert result["nothing"]["working_bytes"] < 30 * MIB


@pytest.mark.parametrize("other", [1.00002, -1.0, float("nan")])
def test_sides_with_different_results_raise(other):
    check_agreement({"moddistill": {"loss": 1.0}, "dense": {}, "torch": {"loss": 1.000005}})
    with pytest.raises(RuntimeError, match="sides disagree on loss"):
        check_agreement({"moddistill": {"loss": 1.0}, "torch": {"loss": other}})


def test_models_of_benchmarks_can_be_saved_and_loaded():
    for config in (*kd_step.architectures(), vision_tower.architecture()):
        check_architecture(config, "benchmark")


@pytest.mark.slow
def test_checkpoint_of_convert_benchmark_is_readable(tmp_path):
    """One layer, since a checkpoint is never smaller than its embedding."""
    largest = convert.make_checkpoint(tmp_path / "hf", gigabytes=0.1, shards=2)
    source = open_source(tmp_path / "hf")
    assert source.decoder.num_layers == 1
    assert sum(x.nbytes for x in source.checkpoint.values()) > largest > 600 * 10**6


def test_digests_benchmark_measures_every_access():
    result = digests.measure(gigabytes=0.001)
    assert set(result) == {
        "read, cold", "read, warm", "write digests", "verify, warm", "verify, cold"
    }  # fmt: skip
    assert all(seconds > 0 for seconds in result.values())


@pytest.mark.slow
def test_index_benchmark_measures_every_part():
    result = data_index.measure(records=3000, distinct_records=600, rounds=1)
    assert result["make"]["json"]["records_per_second"] > 0
    assert result["use"]["rows"] > 3000 * 576 / 2048
    assert 0 < result["use"]["read_median_ms"] <= result["use"]["read_99_percent_ms"]


@pytest.mark.slow
def test_loading_benchmark_measures_every_side():
    torch_or_skip.load_module()
    sides = {
        f"{kind} {workers}": (kind, workers) for kind in ("packed", "torch") for workers in (0, 2)
    }
    result = data_loading.compare(seconds=0.2, rounds=1, records=64, sides=sides)
    speeds = {side: figures["samples_per_second"] for side, figures in result["sides"].items()}
    assert speeds.keys() == sides.keys()
    assert result["workers_packed"] == speeds["packed 2"] / speeds["packed 0"]
    best = {kind: max(speeds[f"{kind} 0"], speeds[f"{kind} 2"]) for kind in ("packed", "torch")}
    assert result["ratio_packed"] == best["packed"] / best["torch"] > 0


@pytest.mark.slow
def test_parquet_benchmark_reads_batches(monkeypatch):
    monkeypatch.setattr(data_parquet, "CASES", [(30, 2)])
    [(case, figures)] = data_parquet.measure(rows=60, kib=10).items()
    assert case == "row groups of 30, 2 rows an image"
    assert 0.2 < figures["file_mib"] < 0.6
    assert figures["samples_per_second"] > 0
    assert 100 < figures["index_memory_mib"] <= figures["memory_mib"] < 1024


def test_efficiency_benchmark_computes_every_model_and_measures_those_that_fit(monkeypatch):
    """In this process, with a model that may be measured and one that is too large."""
    tiny = preset("tiny")
    sparse = upcycle_config(tiny, ExpertConfig(num_experts=16))
    monkeypatch.setattr(efficiency, "models", lambda: {"small": tiny, "large": sparse})
    monkeypatch.setattr(efficiency, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(efficiency, "NEW", 4)
    monkeypatch.setattr(efficiency, "_PAIRS", ("large", "small"))
    monkeypatch.setattr(efficiency, "resident_bytes", lambda _: 3 * efficiency.GIB)
    result = efficiency.run(["v5e", "a100"], rounds=1, most_gib=0.0002)
    assert result["computed"].keys() == {"small", "large"}
    [(name, figures)] = result["measured"].items()
    seconds = figures["prefill_seconds"] + 3 * figures["token_seconds"]
    assert (name, figures["tokens_per_second"]) == ("small", pytest.approx(4 / seconds))
    text = efficiency.tables(result)
    assert text.count("\n| small |") == 2
    assert "| 3.00 GiB |" in text
    assert "\n| tokens/s | 38.5 (247%), 15.6 |" in text
    for plan in result["computed"].values():
        del plan["chips"]["a100"]
    text = efficiency.tables(result)
    assert "\n| tokens/s |" not in text and "\n| memory, GB |" in text


def test_shape_of_qwen_vl_chat_has_the_published_numbers_of_parameters():
    """9.6 G: a language model of 7.7, a vision encoder of 1.9, an adapter of 0.08."""
    config = efficiency.models()[efficiency.QWEN_VL]
    assert parameter_counts(config)[0] == pytest.approx(9.6e9, rel=0.01)
    size = efficiency.size_of(efficiency.QWEN_VL, config)
    assert size.prompt_tokens == 256 + 64


def test_teacher_cache_benchmark_reads_what_it_writes(tmp_path):
    teacher_cache.write(tmp_path, records=4100, tokens=2, ids=3)
    assert len(list(tmp_path.glob("*.array_record"))) == 2
    found = teacher_cache.read(tmp_path)
    assert 0 < found["median_read_seconds"] <= found["opening_seconds"]
