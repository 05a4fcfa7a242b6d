import chex
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.layer_plan import (
    Segment,
    make_plan,
    moe_layers,
    separate,
    separate_layers,
    stack,
    unstack,
)


@pytest.mark.parametrize(
    ("placement", "num_layers", "expected"),
    [
        ("sparse", 4, (0, 2)),
        ("sparse", 5, (0, 2, 4)),
        ("sparse", 1, (0,)),
        ("dense", 3, (0, 1, 2)),
        ("first_half", 4, (0, 1)),
        ("first_half", 5, (0, 1)),
        ("second_half", 4, (2, 3)),
        ("second_half", 5, (2, 3, 4)),
        ((3, 0), 4, (0, 3)),
        ([1], 2, (1,)),
    ],
)
def test_placements_name_the_expert_layers(placement, num_layers, expected):
    assert moe_layers(placement, num_layers) == expected


@pytest.mark.parametrize(
    ("placement", "named"),
    [
        (
            "spares",
            "'sparse', 'every_layer', 'dense', .* or layer indices, got 'spares' .*mean 'sparse'",
        ),
        ((0, 4), r"one or more distinct layers from 0 to 3, got \(0, 4\)"),
        ((-1, 2), r"\(-1, 2\)"),
        ((1, 1), r"\(1, 1\)"),
        ((), r"\(\)"),
    ],
)
def test_placements_that_do_not_fit_are_named(placement, named):
    with pytest.raises(ValueError, match=named):
        moe_layers(placement, 4)


def test_a_half_of_one_layer_is_no_expert_layer():
    with pytest.raises(ValueError, match=r"got 'first_half', which is layers \(\)"):
        moe_layers("first_half", 1)


DENSE, SPARSE = (False,), (True,)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("....", [(DENSE, 4)]),
        ("xxx", [(SPARSE, 3)]),
        ("x.x.", [(SPARSE + DENSE, 2)]),
        ("x.x.x", [(SPARSE + DENSE, 2), (SPARSE, 1)]),
        ("xx..", [(SPARSE, 2), (DENSE, 2)]),
        ("..xxx", [(DENSE, 2), (SPARSE, 3)]),
        (".x..", [(DENSE, 1), (SPARSE, 1), (DENSE, 2)]),
        ("x..x..", [(SPARSE + DENSE + DENSE, 2)]),
        ("x", [(SPARSE, 1)]),
        ("", []),
    ],
)
def test_a_plan_is_the_longest_repeating_segments(kinds, expected):
    plan = make_plan([kind == "x" for kind in kinds])
    assert plan == tuple(Segment(*segment) for segment in expected)


def random_kinds(seed):
    rng = np.random.default_rng(seed)
    return (rng.random(rng.integers(1, 20)) < 0.5).tolist()


def spelt_out(plan):
    return [kind for segment in plan for _ in range(segment.repeats) for kind in segment.pattern]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_spells_out_its_layers(seed):
    assert spelt_out(make_plan(random_kinds(seed))) == random_kinds(seed)


def numbered(kinds):
    """Layers of two kinds, which differ in their parameters, filled with their own index."""
    return [
        {"moe" if sparse else "mlp": {"kernel": jnp.full((2, 3), i)}, "norm": jnp.full(2, i)}
        for i, sparse in enumerate(kinds)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_unstacking_undoes_stacking(seed):
    kinds = random_kinds(seed)
    plan = make_plan(kinds)
    chex.assert_trees_all_equal(unstack(stack(numbered(kinds), plan), plan), numbered(kinds))


@pytest.mark.parametrize("seed", range(5))
def test_separate_layers_are_those_of_the_stack(seed):
    """In order, each with arrays of its own; the stacked ones are given back."""
    kinds = random_kinds(seed)
    plan = make_plan(kinds)
    stacked = stack(numbered(kinds), plan)
    found = separate_layers(stacked, plan)
    chex.assert_trees_all_equal(unstack(found, separate(plan)), numbered(kinds))
    assert separate(plan) == tuple(Segment((kind,), 1) for kind in kinds)
    for i, segment in enumerate(plan):
        if segment.repeats > 1:
            assert stacked[f"segment_{i}"]["block_0"]["norm"].is_deleted()


def test_repeats_are_stacked_in_front_and_blocks_keep_their_place_in_the_period():
    kinds = [True, False, True, False, True]
    params = stack(numbered(kinds), make_plan(kinds))
    assert params.keys() == {"segment_0", "segment_1"}
    np.testing.assert_array_equal(params["segment_0"]["block_0"]["norm"], [[0, 0], [2, 2]])
    np.testing.assert_array_equal(params["segment_0"]["block_1"]["norm"], [[1, 1], [3, 3]])
    np.testing.assert_array_equal(params["segment_1"]["block_0"]["norm"], [[4, 4]])
    assert params["segment_0"]["block_1"].keys() == {"mlp", "norm"}
    assert params["segment_0"]["block_0"]["moe"]["kernel"].shape == (2, 2, 3)
