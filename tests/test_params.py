import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.params import check_same, count, flatten, match, merge, split, unflatten

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
def test_match(patterns, expected):
    assert match(PATHS, patterns, "here") == set(expected)


def test_pattern_must_match_a_whole_path():
    with pytest.raises(ValueError, match=r"config\.trainable: pattern 'decoder' matches no"):
        match(PATHS, ["decoder/.*", "decoder"], "config.trainable")


def test_split_and_merge():
    trained, frozen = split(PARAMS, {"decoder/norm"})
    assert list(trained) == ["decoder/norm"]
    assert sorted(frozen) == sorted(set(PATHS) - {"decoder/norm"})
    assert merge(trained, frozen) == PARAMS


def test_count():
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
