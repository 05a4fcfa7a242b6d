"""Targets at some positions of a model in PyTorch."""

import numpy as np
import pytest

from moddistill.teachers.entries import EntryFormat
from tests import torch_or_skip

torch_or_skip.skip_module()
import torch  # noqa: E402

from moddistill.extraction.transformers_targets import Positions, targets_of  # noqa: E402

P = np.array([0.5, 0.0, 0.3, 0.2])
DRAWS = 400


def drawn(records, seed=0):
    """Ids of the distribution P at the first position of records."""
    places = np.array([[record, 0] for record in records])
    hidden = torch.log(torch.tensor(P, dtype=torch.float32)).clamp(min=-1e9)
    head = torch.nn.Identity()
    labels = np.zeros(len(places), np.int64)
    positions = Positions(hidden.expand(len(places), -1), labels, places)
    return targets_of(positions, head, EntryFormat("samples", DRAWS, ((0, 4),)), 1.0, seed).ids


def test_drawn_ids_have_the_teachers_probabilities():
    """Within 3 standard errors of 20,000 draws; an id without probability is never drawn."""
    ids = drawn(range(50))
    shares = np.bincount(ids.reshape(-1), minlength=4) / ids.size
    assert np.all(np.abs(shares - P) <= 3 * np.sqrt(P * (1 - P) / ids.size))


@pytest.mark.parametrize("other", [([4], 0), ([3], 1)], ids=["record", "seed"])
def test_each_record_and_seed_has_draws_of_its_own(other):
    np.testing.assert_array_equal(drawn([3]), drawn([3]))
    assert np.mean(drawn(*other) == drawn([3])) < 0.6
