import types

import pytest
from jax.experimental import topologies

from moddistill.distributed.accelerators import CHIPS, parse_topology, peak_flops, topology_devices


def test_topologies():
    assert parse_topology("v5p:2x2x1") == ("v5p", (2, 2, 1))
    assert parse_topology("cpu:8") == ("cpu", (8,))
    assert len(topology_devices("cpu:4")) == 4


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:2x2", r"unknown accelerator; accepted: v4, v5e, .*did you mean 'v5"),
        ("v5e", r"states no sizes; accepted: such as v5e:4x4"),
        ("v5e:0x4", r"states no sizes"),
        ("v6e:2x2x2", r"has 3 sizes; accepted: 2, .* such as v6e:2x2"),
        ("v5p:8", r"has 1 sizes; accepted: 3, .* such as v5p:2x2x2"),
        ("cpu:512", r"needs 512 devices, there are 8"),
    ],
)
def test_topology_that_is_none(topology, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(topology)


def test_memory_is_of_one_chip():
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
def test_speed_by_the_name_that_a_backend_gives_its_devices(kind, flops):
    devices = [types.SimpleNamespace(device_kind=kind)] * 2
    assert peak_flops(devices) == (None if flops is None else 2 * flops)


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:2x4"])
def test_an_accelerator_without_its_compiler(monkeypatch, topology):
    def missing(**_):
        raise RuntimeError("no such backend\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    extra = "cuda12" if topology.startswith("h") else "tpu"
    with pytest.raises(ValueError, match=rf"{topology}.*no such backend\).*extra `{extra}`"):
        topology_devices(topology)


def test_machines_times_gpus(monkeypatch):
    asked = {}

    def found(**options):
        asked.update(options)
        return types.SimpleNamespace(devices=())

    monkeypatch.setattr(topologies, "get_topology_desc", found)
    topology_devices("h100:4x8")
    assert (asked["platform"], asked["topology"]) == ("cuda", "1x4x8")
    assert "cuda_compute_capability { major: 9 minor: 0 }" in asked["target_config"]
    topology_devices("a100:8")
    assert asked["topology"] == "1x1x8"
