"""The stages of the recipe, as data.

A stage is which parameters train, which loss, whether a teacher is needed, which records are read
and whether a dense student becomes sparse first. Nothing else differs, so there is one loop.
"""

import dataclasses
import functools
from collections.abc import Callable

from moddistill.config import TrainConfig, nearest
from moddistill.losses.kd import token_loss
from moddistill.losses.preference import preference_loss

_LANGUAGE = "decoder/.*"
_PROJECTOR = "projector/.*"
_EXPERTS = "decoder/.*/moe/.*"
_DENSE_MLP = "decoder/.*/mlp/.*"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row. `trains` is the paper's set, `also` what the reference code trains beyond it."""

    trains: tuple[str, ...]
    loss: Callable
    also: tuple[str, ...] = ()
    teacher: bool = False
    sparse: bool = False
    records: str = "conversation"


STAGES: dict[str, Stage] = {
    "sft": Stage(
        trains=(_LANGUAGE, _PROJECTOR),
        loss=functools.partial(token_loss, terms=("ce",)),
    ),
    "init": Stage(
        trains=(_PROJECTOR,),
        loss=functools.partial(token_loss, terms=("ce",)),
    ),
    "d2d": Stage(
        trains=(_LANGUAGE, _PROJECTOR),
        loss=functools.partial(token_loss, terms=("kd",)),
        teacher=True,
    ),
    "d2s": Stage(
        trains=(_EXPERTS, _PROJECTOR),
        also=(_DENSE_MLP,),
        loss=functools.partial(token_loss, terms=("kd", "ce")),
        teacher=True,
        sparse=True,
    ),
    "preference": Stage(
        trains=(_EXPERTS, _PROJECTOR),
        also=(_DENSE_MLP,),
        loss=preference_loss,
        teacher=True,
        records="preference",
    ),
}


def stage_of(config: TrainConfig) -> Stage:
    """The row of the config's stage; ValueError for an unknown one or a teacher too few or many."""
    if config.stage not in STAGES:
        raise ValueError(
            f"config.stage is {config.stage!r}; accepted: {', '.join(STAGES)}"
            + nearest(config.stage, STAGES)
        )
    stage = STAGES[config.stage]
    if stage.teacher and not config.teacher:
        raise ValueError(f"config.teacher is empty; stage {config.stage!r} needs a model folder")
    if config.teacher and not stage.teacher:
        raise ValueError(
            f"config.teacher is {config.teacher!r}; stage {config.stage!r} takes no teacher"
        )
    return stage


def trainable_patterns(config: TrainConfig) -> tuple[str, ...]:
    """Patterns of the parameters that train: the paper's set, the reference's, or the config's."""
    stage = stage_of(config)
    if config.trainable == "paper":
        return stage.trains
    if config.trainable == "reference":
        return stage.trains + stage.also
    if isinstance(config.trainable, str):
        raise ValueError(
            f"config.trainable is {config.trainable!r}; accepted: 'paper', 'reference', or a tuple "
            "of patterns of parameter paths"
        )
    return config.trainable
