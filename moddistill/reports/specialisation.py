"""Loads of experts: shares of image and text tokens, and how modalities and tasks differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moddistill.errors import UserError
from moddistill.evals.task import Column
from moddistill.reports.template import Html, join, part
from moddistill.reports.workdirs import Content, Results

_COLUMNS = (
    Column("model", "Model", ""),
    Column("task", "Task", ""),
    Column("layer", "Layer", ""),
    Column("modalities", "Image against text", ".2f"),
    Column("tasks", "Against other tasks", ".2f"),
)


def load_cards(task: Sequence[Results], problems: list[str]) -> list[Html]:
    """Returns a card for each layer of each sparse model; loads that are wrong become problems."""
    cards = []
    for results in task:
        try:
            cards += [load_card(load, results.model) for load in results.loads]
        except UserError as error:
            problems.append(f"{results.model}, {results.task}: {error}")
    return cards


def load_card(load: Mapping[str, Any], model: str = "") -> Html:
    """Returns bars of each expert's share of a layer's image and text tokens.

    Args:
      load: `layer`, and for `image` and `text` one number per expert, in any unit.
      model: name for the title, if there are several.

    Raises:
      UserError: if the two differ in length, a number is negative, or a sum is not positive.
    """
    shares = {kind: expert_shares(load, kind) for kind in ("image", "text")}
    experts = len(shares["image"])
    if len(shares["text"]) != experts:
        raise UserError(
            f"layer {load['layer']}: expected as many text loads as image loads, {experts}, got"
            f" {len(shares['text'])}"
        )
    # A full row is twice the even share, so that layers compare; a larger share stretches it.
    full = max(2 / experts, *shares["image"], *shares["text"])
    rows = join(
        part(
            "load_row",
            expert=expert,
            even=f"{1 / experts / full:.2%}",
            image=f"{image:.0%}",
            text=f"{text:.0%}",
            image_width=f"{image / full:.2%}",
            text_width=f"{text / full:.2%}",
        )
        for expert, (image, text) in enumerate(zip(*shares.values(), strict=True))
    )
    title = f"{model}, layer {load['layer']}" if model else f"Layer {load['layer']}"
    return part("load", title=title, rows=rows)


def expert_shares(load: Mapping[str, Any], kind: str) -> list[float]:
    """Returns the loads of `image` or `text` tokens divided by their sum.

    Questions without images have no load of image tokens, and zeros here.

    Raises:
      UserError: a load is negative, or there are none of both kinds.
    """
    values = load[kind]
    total = sum(values)
    if min(values, default=-1) < 0 or not any([*load["image"], *load["text"]]):
        raise UserError(
            f"layer {load['layer']}: expected {kind} loads >= 0 with a sum > 0, got {values}"
        )
    return [value / (total or 1.0) for value in values]


def specialisation_table(content: Content) -> tuple[Sequence[Column], list[dict[str, Any]]]:
    """Returns the columns and rows of distances between loads of image and text, and of tasks."""
    rows = []
    for results in content.results:
        others = [
            each
            for each in content.results
            if each.model == results.model and each.task != results.task and each.loads
        ]
        for place, load in enumerate(results.loads):
            mine = _both(load)
            loads = [_both(each.loads[place]) for each in others if place < len(each.loads)]
            # Results of another model in a folder of the same name may have other experts.
            others_here = [each for each in loads if len(each) == len(mine)]
            rows.append(
                {
                    "model": results.model,
                    "task": results.task,
                    "layer": load["layer"],
                    "modalities": distance(load["image"], load["text"]),
                    "tasks": distance(mine, np.sum(others_here, axis=0)) if others_here else None,
                }
            )
    return _COLUMNS, rows


def distance(first: ArrayLike, second: ArrayLike) -> float | None:
    """Returns the total variation distance of two loads: 0 if their shares are equal, 1 if they
    share no expert. None if a load is empty, as that of images is for questions without any.
    """
    if not np.sum(first) > 0 or not np.sum(second) > 0:
        return None
    shares = [np.asarray(load) / np.sum(load) for load in (first, second)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _both(load: Mapping[str, Any]) -> np.ndarray:
    """The mean of image and text shares, whose counts are not known."""
    return (np.asarray(load["image"]) + np.asarray(load["text"])) / 2
