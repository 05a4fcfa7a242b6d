import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moddistill.planning.hlo_collectives import collectives

ASYNCHRONOUS = """
%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

%inner (x: f32[]) -> f32[] {
  %r = f32[2]{0} reduce-scatter(%x), channel_id=4
}

ENTRY %main (x: f32[8,4]) -> f32[2] {
  %a = f32[8,4]{1,0} all-reduce(%x), channel_id=1, to_apply=%sum
  %b = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%y), channel_id=2
  %c = bf16[16]{0} all-gather-done(%b)
  %d = ((f32[4]{0}), f32[2]{0}, s32[]) async-start(%x), calls=%inner
  %e = (s8[4]{0}, s8[4]{0}) all-to-all(%x, %y), channel_id=3
  %f = f32[2]{0} add(f32[2]{0} %p, f32[2]{0} %q)
}
"""


def test_synchronous_and_asynchronous_collectives_are_counted():
    assert collectives(ASYNCHRONOUS) == {
        "all-reduce": {"count": 1, "bytes": 128},
        "all-gather": {"count": 1, "bytes": 32},
        "reduce-scatter": {"count": 1, "bytes": 8},
        "all-to-all": {"count": 1, "bytes": 8},
    }


# HLO of the TPU compiler: the bound is in the condition, and a collective that overlaps with other
# operations is repeated in fusions.
LOOP = """
%condition (c: (s32[], bf16[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%async_collective_fusion.3 (x: bf16[4]) -> bf16[16] {
  %a1 = bf16[16]{0:T(8,128)} all-gather(%x), channel_id=7
}

%body (c: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %s = bf16[16] fusion(%x), kind=kCustom, calls=%async_collective_fusion.3
  %a2 = bf16[16]{0:T(8,128)} all-gather(%x), channel_id=7
}

ENTRY %main (x: bf16[4]) -> bf16[4] {
  %w = (s32[], bf16[4]) while(%t), condition=%condition, body=%body, metadata={}
}
"""


def test_collectives_count_per_loop_iteration_and_not_per_fusion():
    assert collectives(LOOP) == {"all-gather": {"count": 12, "bytes": 12 * 32}}


def test_collective_that_overlaps_with_a_loop_counts_once():
    started_before = LOOP.replace(
        "  %w = (s32", "  %a0 = bf16[16]{0} all-gather(%x), channel_id=7\n  %w = (s32"
    )
    assert collectives(started_before) == {"all-gather": {"count": 1, "bytes": 32}}


def test_collectives_of_one_channel_are_distinct_outside_of_async_fusions():
    """All collectives of a `shard_map` have channel 1."""
    assert (
        collectives(LOOP.replace("async_collective_fusion", "fusion"))["all-gather"]["count"] == 24
    )


def test_collective_in_a_loop_of_unknown_length_counts_once():
    assert collectives(LOOP.replace("constant(12)", "parameter(1)"))["all-gather"]["count"] == 1


@pytest.mark.parametrize("layers", [3, 12])
def test_compiled_scan_gathers_its_kernels_once_per_layer(layers):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def shape(*size, spec):
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))

    def run(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    kernels = shape(layers, 64, 64, spec=PartitionSpec(None, "fsdp"))
    x = shape(512, 64, spec=PartitionSpec("fsdp"))
    found = collectives(jax.jit(run).lower(kernels, x).compile().as_text())
    assert found == {"all-gather": {"count": layers, "bytes": layers * 64 * 64 * 4}}
