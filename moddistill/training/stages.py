"""The stages of the recipe, as data.

A stage is which parameters train, which loss, whether a teacher is needed, which records are read
and whether a dense student becomes sparse first. Nothing else differs, so there is one loop.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from moddistill.config import TrainConfig
from moddistill.errors import UserError
from moddistill.losses import Loss
from moddistill.losses.distillation import token_loss
from moddistill.losses.preference import preference_loss
from moddistill.models.vision import NEVER_COMPUTED
from moddistill.models.vlm import Vlm
from moddistill.params import match
from moddistill.teachers.targets import Teacher

_LANGUAGE = "decoder/.*"
_PROJECTOR = "projector/.*"
_EXPERTS = "decoder/.*/moe/.*"
_DENSE_MLP = "decoder/.*/mlp/.*"
_NEVER_COMPUTED = tuple(f"vision/{name}/" for name in NEVER_COMPUTED)


def _token_loss(config: TrainConfig, student: Vlm, teacher: Teacher | None, terms: Any) -> Loss:
    return token_loss(
        student,
        teacher,
        config.distillation,
        config.router,
        terms=terms,
        chunk_size=config.logits_chunk_size,
    )


def _preference_loss(config: TrainConfig, student: Vlm, teacher: Teacher) -> Loss:
    return preference_loss(
        student, teacher, config.preference, config.router, chunk_size=config.logits_chunk_size
    )


def _settings(part: str) -> tuple[str, ...]:
    """Dotted names of the settings in one part of the config."""
    return tuple(f"{part}.{field.name}" for field in dataclasses.fields(getattr(TrainConfig, part)))


_CE = ("distillation.ce_weight",)
_KD = tuple(name for name in _settings("distillation") if name not in _CE)
_PREFERENCE = _settings("preference")
_ROUTER = _settings("router")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
      trains: patterns of the parameters that train in the paper.
      also: patterns of those that the reference code trains beyond them.
      loss: from config, student and teacher (or None) to the loss.
      reads: dotted names of the settings that its loss reads.
      teacher: whether it needs a teacher.
      sparse: whether a dense student becomes sparse before the first step.
      records: kind of records.
    """

    trains: tuple[str, ...]
    loss: Callable[..., Loss]
    reads: tuple[str, ...]
    also: tuple[str, ...] = ()
    teacher: bool = False
    sparse: bool = False
    records: str = "conversation"


STAGES: dict[str, Stage] = {
    "sft": Stage(
        trains=(_LANGUAGE, _PROJECTOR),
        loss=functools.partial(_token_loss, terms=("ce",)),
        reads=_CE + _ROUTER,
    ),
    "init": Stage(
        trains=(_PROJECTOR,),
        loss=functools.partial(_token_loss, terms=("ce",)),
        reads=_CE + _ROUTER,
    ),
    "d2d": Stage(
        trains=(_LANGUAGE, _PROJECTOR),
        loss=functools.partial(_token_loss, terms=("kd",)),
        reads=_KD + _ROUTER,
        teacher=True,
    ),
    "d2s": Stage(
        trains=(_EXPERTS, _PROJECTOR),
        also=(_DENSE_MLP,),
        loss=functools.partial(_token_loss, terms=("kd", "ce")),
        reads=_KD + _CE + _ROUTER,
        teacher=True,
        sparse=True,
    ),
    "preference": Stage(
        trains=(_EXPERTS, _PROJECTOR),
        also=(_DENSE_MLP,),
        loss=_preference_loss,
        reads=_PREFERENCE + _ROUTER,
        teacher=True,
        records="preference",
    ),
}


def stage_of(config: TrainConfig) -> Stage:
    """Returns the row of the config's stage; UserError for a missing teacher or one too many."""
    stage = STAGES[config.stage]
    if stage.teacher and not config.teacher:
        raise UserError(f"config.teacher is empty; stage {config.stage!r} needs a model folder")
    if config.teacher and not stage.teacher:
        raise UserError(
            f"config.teacher is {config.teacher!r}; stage {config.stage!r} takes no teacher"
        )
    return stage


def trainable_paths(config: TrainConfig, paths: Sequence[str]) -> set[str]:
    """Those of `paths` that train: the paper's set, the reference's, or the config's patterns.

    Parameters that are never computed are left out: they have no gradient, and would decay.

    Raises:
      UserError: for an unknown set, a pattern that matches nothing, or nothing that is computed.
    """
    origin = "config.trainable"
    found = match(paths, _patterns(config, paths), origin)
    computed = {path for path in found if not path.startswith(_NEVER_COMPUTED)}
    if not computed:
        raise UserError(
            f"{origin} is {config.trainable!r}, of which nothing is ever computed; accepted: "
            "patterns that match other parameters too"
        )
    return computed


def _patterns(config: TrainConfig, paths: Sequence[str]) -> tuple[str, ...]:
    stage, chosen = stage_of(config), config.trainable
    if isinstance(chosen, tuple) and chosen in (("paper",), ("reference",)):
        [chosen] = chosen  # a word typed for a field that an experiment has as a tuple
    if chosen == "paper":
        return stage.trains
    if chosen == "reference":
        # Where all layers have experts, there is nothing else to train.
        left = (p for p in stage.also if any(re.fullmatch(p, path) for path in paths))
        return (*stage.trains, *left)
    if isinstance(chosen, str):
        raise UserError(
            f"config.trainable is {chosen!r}; accepted: 'paper', 'reference', or a tuple of "
            "patterns of parameter paths"
        )
    return chosen
