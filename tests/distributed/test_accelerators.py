import types

import pytest
from jax.experimental import topologies

from moddistill.distributed.accelerators import CHIPS, parse_topology, peak_flops, topology_devices


def test_topologies_are_parsed():
    assert parse_topology("v5p:2x2x1") == ("v5p", (2, 2, 1))
    assert parse_topology("cpu:8") == ("cpu", (8,))
    assert len(topology_devices("cpu:4")) == 4


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:2x2", r"^accelerator of topology 'v5x:2x2': .*'v5e', .*'v5x' \(did you mean 'v5"),
        ("v5e", r"^topology: expected a name and sizes, as v5e:4x4, .*got 'v5e'"),
        ("v5e:0x4", r"^topology: expected a name and sizes, .*got 'v5e:0x4'"),
        ("v6e:2x2x2", r"^topology: expected 2 sizes, as v6e:2x2, got 'v6e:2x2x2'"),
        ("v5p:8", r"^topology: expected 3 sizes, as v5p:2x2x2, got 'v5p:8'"),
        ("cpu:512", r"^topology: expected at most 8 devices .*, got 'cpu:512'"),
    ],
)
def test_malformed_topology_is_an_error(topology, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(topology)


def test_memory_of_a_chip_is_the_published_one():
    """HBM as published, in GiB; that of the newest GPUs in decimal units."""
    memory = {name: round(chip.memory / 2**30) for name, chip in CHIPS.items()}
    tpus = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
    assert memory == tpus | {"a100": 80, "h100": 80, "h200": 131, "b200": 168}


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_kind(kind, flops):
    devices = [types.SimpleNamespace(device_kind=kind)] * 2
    assert peak_flops(devices) == (None if flops is None else 2 * flops)


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:2x4"])
def test_accelerator_without_its_compiler_is_an_error_that_names_the_extra(monkeypatch, topology):
    def missing(**_):
        raise RuntimeError("no such backend\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    extra = "cuda12" if topology.startswith("h") else "tpu"
    with pytest.raises(ValueError, match=rf"extra `{extra}`.*got '{topology}' .*no such backend\)"):
        topology_devices(topology)


def test_gpu_topology_is_machines_times_gpus(monkeypatch):
    passed = {}

    def describe(**options):
        passed.update(options)
        return types.SimpleNamespace(devices=())

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    topology_devices("h100:4x8")
    assert (passed["platform"], passed["topology"]) == ("cuda", "1x4x8")
    assert "cuda_compute_capability { major: 9 minor: 0 }" in passed["target_config"]
    topology_devices("a100:8")
    assert passed["topology"] == "1x1x8"
