import pytest

from moddistill.accelerators import CHIPS, devices_of, parse


def test_topologies():
    assert parse("v5p:2x2x1") == ("v5p", (2, 2, 1))
    assert parse("cpu:8") == ("cpu", (8,))
    assert len(devices_of("cpu:4")) == 4


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:2x2", r"unknown accelerator; accepted: v4, v5e, .*did you mean 'v5"),
        ("v5e", r"states no sizes; accepted: such as v5e:4x4"),
        ("v5e:0x4", r"states no sizes"),
        ("cpu:512", r"needs 512 devices, there are 8"),
    ],
)
def test_topology_that_is_none(topology, message):
    with pytest.raises(ValueError, match=message):
        devices_of(topology)


def test_memory_and_speed_are_of_one_chip():
    """HBM as published: 32, 16, 95, 32 and 192 GiB."""
    assert [chip.memory / 2**30 for chip in CHIPS.values()] == [32, 16, 95, 32, 192]
