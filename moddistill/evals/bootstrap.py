"""Bootstrap confidence intervals of scores, and of differences between models.

A score is computed from units, which are drawn with replacement: questions, or images if the
questions of an image only count together.

    score = sum over strata of (sum of numerators / sum of denominators)

A mean has one stratum and denominators of 1. F1 and CHAIR are ratios of sums. MME is a sum over
categories, each of which is drawn by itself, since its number of images is fixed.

Draws depend on the name of the task and on the number of units only. So models that answered the
same questions have the same questions in each replicate, and the interval of the difference of
their replicates is a paired one: what is hard for every model cancels.

References:
  Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapters 10 and 13 (percentiles).
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
    """Units of one score of one model, in the order of strata.

    Attributes:
      ids: names of the units, equal for models that answered the same questions.
      strata: the stratum of each unit, ascending from 0.
      numerators, denominators: contributions to the sums of the stratum.
    """

    ids: tuple[str, ...]
    strata: Int[np.ndarray, "N"]
    numerators: Float[np.ndarray, "N"]
    denominators: Float[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, with the ends of its interval."""

    score: float
    low: float
    high: float


def ratio_units(ids: Sequence[str], numerators: ArrayLike, denominators: ArrayLike) -> Units:
    """Returns the units of a ratio of sums over questions."""
    return Units(
        ids=tuple(ids),
        strata=np.zeros(len(ids), int),
        numerators=np.asarray(numerators, float),
        denominators=np.asarray(denominators, float),
    )


def mean_units(ids: Sequence[str], values: ArrayLike) -> Units:
    """Returns the units of a mean over questions."""
    return ratio_units(ids, values, np.ones(len(ids)))


def point(units: Units) -> float:
    """Returns the score of the units as they are."""
    return _score(units, np.arange(len(units.ids)))


def replicates(units: Units, name: str) -> Float[np.ndarray, "B"]:
    """Returns the scores of `RESAMPLES` draws.

    Args:
      units: at least one.
      name: of the task. It seeds the draws, so that they depend neither on the other tasks nor on
        their order.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    sizes = np.bincount(units.strata)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    bounds = np.repeat(sizes, sizes)
    return np.array([_score(units, starts + rng.integers(bounds)) for _ in range(RESAMPLES)])


def interval(values: Float[np.ndarray, "B"]) -> tuple[float, float]:
    """Returns the percentiles between which `CONFIDENCE` of the replicates are."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def _score(units: Units, index: Int[np.ndarray, "N"]) -> float:
    """The score of drawn units; a stratum without anything to count adds 0."""
    above = np.bincount(units.strata, units.numerators[index])
    below = np.bincount(units.strata, units.denominators[index])
    return float(np.divide(above, below, out=np.zeros_like(above), where=below != 0).sum())
