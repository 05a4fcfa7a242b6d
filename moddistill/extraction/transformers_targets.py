"""Targets of a teacher of `transformers` from its logits, as `extraction.program` makes them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from moddistill.models.vocabulary import token_mask
from moddistill.teachers.entries import EntryFormat, TokenTargets


class Positions(NamedTuple):
    """Positions of a batch that predict supervised tokens.

    Attributes:
      hidden: final hidden states, `[N, D]`.
      labels: the next tokens, `[N]`.
      places: number of the record and position in it, `[N, 2]`, on which drawn ids depend.
    """

    hidden: torch.Tensor
    labels: np.ndarray
    places: np.ndarray

    def chunks(self, size: int) -> Iterator["Positions"]:
        """Yields `size` positions at a time."""
        for start in range(0, len(self.labels), size):
            at = slice(start, start + size)
            yield Positions(*(x[at] for x in self))


def targets_of(
    positions: Positions,
    head: Callable[[torch.Tensor], torch.Tensor],
    format: EntryFormat,
    temperature: float,
    seed: int,
) -> TokenTargets:
    """Returns the targets of positions whose logits fit into memory."""
    logits = head(positions.hidden).float()
    real = torch.from_numpy(token_mask(format.real_ids, logits.shape[1])).to(logits.device)
    logits = logits.masked_fill(~real, float("-inf"))
    labels = torch.from_numpy(positions.labels).to(logits.device, torch.int64)[:, None]
    label_logprobs = _numpy(torch.log_softmax(logits, dim=1).gather(1, labels)[:, 0])
    if format.kind == "answers":
        return TokenTargets(label_logprobs, positions.labels)
    log_p = torch.log_softmax(logits / temperature, dim=1)
    if format.kind == "samples":
        ids = _draw(log_p, positions.places, seed, format.ids)
        return TokenTargets(label_logprobs, positions.labels, *_at(log_p, ids))
    ids = log_p.topk(format.ids, dim=1).indices
    # Over the other ids only: 1 - sum_k p_k has no correct digit where the sum is nearly 1.
    rest = log_p.scatter(1, ids, float("-inf")).logsumexp(dim=1)
    return TokenTargets(
        label_logprobs, positions.labels, *_at(log_p, ids), _numpy(rest.clamp(min=-1e30))
    )


def _draw(log_p: torch.Tensor, places: np.ndarray, seed: int, count: int) -> torch.Tensor:
    """Returns ids drawn with replacement, by the inverse of the cumulative distribution."""
    uniform = np.stack(
        [np.random.default_rng([seed, *place]).random(count) for place in places.tolist()]
    )
    cumulative = log_p.double().exp().cumsum(dim=1)
    at = torch.from_numpy(uniform).to(log_p.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)


def _at(log_p: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and their log-probabilities."""
    return _numpy(ids).astype(np.int32), _numpy(log_p.gather(1, ids))


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy()
