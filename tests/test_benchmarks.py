import time

import numpy as np

from benchmarks import convert
from benchmarks.head_to_head import compare
from tools.convert_weights.sources import read_source

MIB = 2**20


def make_files(folder):
    (folder / "size").write_text(str(64 * MIB))


def nothing(_):
    return lambda: None


def slow_and_large(folder):
    size = int((folder / "size").read_text())

    def run():
        time.sleep(0.02)
        np.ones(size, np.uint8)

    return run


SIDES = {"nothing": nothing, "slow": slow_and_large}


def test_sides_are_timed_and_weighed():
    result = compare("tests.test_benchmarks", rounds=3)
    assert result["nothing"]["seconds"] < 0.02 < result["slow"]["seconds"]
    assert result["slow"]["peak_bytes_of_the_work"] > 60 * MIB
    assert result["nothing"]["peak_bytes_of_the_work"] < 30 * MIB


def test_checkpoint_that_is_converted(tmp_path):
    """One layer, since less than the embedding cannot be asked for."""
    largest = convert.make_checkpoint(tmp_path / "hf", gigabytes=0.1, shards=2)
    source = read_source(tmp_path / "hf")
    assert source.decoder.layers == 1
    assert sum(x.nbytes for x in source.checkpoint.values()) > largest > 600 * 10**6
