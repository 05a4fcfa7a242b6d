"""Meshes over which the rows of a batch can be divided."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from moddistill.training.validation import check_batch_divides_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def spread_over(processes, **axes):
    """A mesh whose device i belongs to process `processes[i]`."""
    shape = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | axes
    devices = np.array([Device(i, process) for i, process in enumerate(processes)])
    return Mesh(devices.reshape(*shape.values()), tuple(shape))


@pytest.mark.parametrize(
    ("processes", "axes"),
    [
        ((0, 0, 1, 1), {"data": 2, "tensor": 2}),
        ((0, 1, 0, 1), {"fsdp": 2, "expert": 2}),  # in any order, as on a torus
    ],
)
def test_mesh_whose_batch_shards_each_have_one_process_is_accepted(tiny_config, processes, axes):
    check_batch_divides_mesh(tiny_config("sft"), spread_over(processes, **axes))


@pytest.mark.parametrize(
    ("processes", "axes", "message"),
    [
        ((0, 1), {"tensor": 2}, r"mesh\.tensor: expected a size, .* in one process, got 2$"),
        ((0, 1, 0, 1), {"data": 2, "tensor": 2}, r"mesh\.tensor: .*, got 2$"),
        ((0, 1, 1, 1), {"data": 4}, r"^config\.mesh: expected equally many .*, got \[1, 3\]$"),
    ],
)
def test_mesh_with_batch_shards_across_processes_is_refused(tiny_config, processes, axes, message):
    with pytest.raises(ValueError, match=message):
        check_batch_divides_mesh(tiny_config("sft"), spread_over(processes, **axes))


@pytest.mark.parametrize(("share", "accumulate"), [(0.29, 1), (0.7, 1), (0.7, 10), (0.5, 50)])
def test_share_of_the_rows_of_a_device_is_accepted(tiny_config, share, accumulate):
    """200 rows for each device, 1/50 of them in a micro-batch at least."""
    config = tiny_config(
        "d2d", batch_size=400, grad_accum_steps=accumulate, on_policy={"share": share}
    )
    check_batch_divides_mesh(config, spread_over((0, 0), data=2))


def test_share_that_divides_a_row_is_refused(tiny_config):
    config = tiny_config("d2d", batch_size=12, grad_accum_steps=2, on_policy={"share": 0.5})
    said = r"^config\.on_policy\.share: expected .* whole number of the 3 rows .* got 0\.5$"
    with pytest.raises(ValueError, match=said):
        check_batch_divides_mesh(config, spread_over((0, 0), data=2))
