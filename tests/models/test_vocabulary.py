import numpy as np
import pytest

from moddistill.models.vocabulary import common_ids, id_ranges, num_ids, token_mask


@pytest.mark.parametrize(
    ("ids", "ranges"),
    [
        ([], ()),
        ([5], ((5, 6),)),
        ([2, 0, 1], ((0, 3),)),
        ([0, 1, 4, 5, 9], ((0, 2), (4, 6), (9, 10))),
    ],
)
def test_ids_as_ranges(ids, ranges):
    assert id_ranges(ids) == ranges
    assert num_ids(ranges) == len(ids)


def test_common_ids_are_those_of_both():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (set(rng.choice(30, rng.integers(0, 30), replace=False).tolist()) for _ in "ab")
        assert common_ids(id_ranges(a), id_ranges(b)) == id_ranges(a & b)


def test_mask_ends_with_the_rows():
    mask = token_mask(((1, 3), (5, 9)), 7)
    np.testing.assert_array_equal(mask, [False, True, True, False, False, True, True])
