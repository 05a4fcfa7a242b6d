"""Comparison of answers."""

import numpy as np


def assert_same_answers(found, expected):
    """Tokens are equal, and log-probabilities up to rounding."""
    for each, other in zip(found, expected, strict=True):
        assert each.prompt_ids == other.prompt_ids
        assert each.token_ids == other.token_ids
        logprobs = ([token.logprob for token in answer.logprobs] for answer in (each, other))
        np.testing.assert_allclose(*logprobs, atol=1e-5)
