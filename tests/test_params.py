import jax.numpy as jnp
import numpy as np
import pytest

from moddistill import params
from moddistill.config import ExpertConfig
from moddistill.distributed.sharding import unbox
from moddistill.models.presets import PRESETS
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import abstract_params
from moddistill.params import (
    GROUPS,
    check_groups,
    check_same,
    count,
    flatten,
    in_group,
    is_computed,
    match,
    merge,
    split,
    unflatten,
)

PARAMS = {
    "decoder": {"mlp": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "norm": np.ones(2)},
    "projector": {"kernel": np.zeros((4, 2))},
}
PATHS = ["decoder/mlp/kernel", "decoder/mlp/bias", "decoder/norm", "projector/kernel"]


def test_flatten_joins_keys_and_unflatten_undoes_it():
    assert sorted(flatten(PARAMS)) == sorted(PATHS)
    assert unflatten(flatten(PARAMS)) == PARAMS


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["decoder/.*"], PATHS[:3]),
        ([".*/kernel"], [PATHS[0], PATHS[3]]),
        (["decoder/norm", "projector/.*"], PATHS[2:]),
    ],
)
def test_match_returns_paths_of_any_pattern(patterns, expected):
    assert match(PATHS, patterns, "here") == set(expected)


def test_pattern_must_match_the_full_path():
    with pytest.raises(
        ValueError, match=r"^config\.trainable: expected a pattern .*, got 'decoder'$"
    ):
        match(PATHS, ["decoder/.*", "decoder"], "config.trainable")


def test_split_and_merge():
    trained, frozen = split(PARAMS, {"decoder/norm"})
    assert list(trained) == ["decoder/norm"]
    assert sorted(frozen) == sorted(set(PATHS) - {"decoder/norm"})
    assert merge(trained, frozen) == PARAMS


def test_count_sums_array_elements():
    assert count(PARAMS) == 6 + 3 + 2 + 8


def test_every_difference_is_listed_in_one_error():
    found = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "d": jnp.zeros(5)}
    expected = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(3), "c": jnp.zeros(1)}
    check_same(found, found, "nothing")
    with pytest.raises(ValueError) as error:
        check_same(found, expected, "folder/params")
    assert str(error.value).splitlines() == [
        "folder/params does not fit the architecture:",
        "  missing c (1,)",
        "  unexpected d (5,)",
        "  b has shape (4,), expected (3,)",
    ]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("moe", [None, ExpertConfig(residual=True)], ids=["dense", "sparse"])
def test_groups_partition_the_parameters_of_every_preset(name, moe):
    config = PRESETS[name] if moe is None else upcycle_config(PRESETS[name], moe)
    flat = flatten(unbox(abstract_params(config)))
    sizes = {group: sum(in_group(path, group) for path in flat) for group in GROUPS}
    assert sum(sizes.values()) == len(flat)
    absent = {group for group, size in sizes.items() if size == 0}
    absent -= set() if moe else {"experts", "routers"}
    absent -= set() if config.vision else {"positions"}
    assert not absent
    assert any(not is_computed(path) for path in flat) == (config.vision is not None)


def test_parameter_of_no_group_or_of_two_and_required_group_without_any(monkeypatch):
    check_groups(["decoder/a/kernel", "decoder/norm/scale"], ["kernels", "norms"])
    with pytest.raises(ValueError, match=r"decoder/a/weight is in no group$"):
        check_groups(["decoder/a/kernel", "decoder/a/weight"], [])
    with pytest.raises(ValueError, match=r"no parameter is in 'experts'$"):
        check_groups(["decoder/a/kernel"], ["kernels", "experts"])
    monkeypatch.setitem(params.GROUPS, "layers", "decoder/a/.*")
    with pytest.raises(ValueError, match=r"decoder/a/kernel is in \['kernels', 'layers'\]$"):
        check_groups(["decoder/a/kernel", "decoder/b/kernel"], [])
