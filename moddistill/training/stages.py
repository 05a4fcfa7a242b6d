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
from moddistill.errors import invalid
from moddistill.losses import Loss
from moddistill.losses.distillation import token_loss
from moddistill.losses.preference import preference_loss
from moddistill.models.vlm import Vlm
from moddistill.params import (
    DENSE_LAYERS,
    EXPERT_LAYERS,
    LANGUAGE_MODEL,
    PROJECTOR,
    is_computed,
    match,
)
from moddistill.teachers.cache import CACHED
from moddistill.teachers.targets import Teacher


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
_ON_POLICY = _settings("on_policy")
_PREFERENCE = _settings("preference")
_ROUTER = _settings("router")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
      trains: patterns of the parameters that train in the paper.
      also: patterns of those that the reference code trains beyond them.
      loss: from config, student and teacher (or None) to the loss.
      reads: dotted names of the settings of its loss and answers that it reads.
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
        trains=(LANGUAGE_MODEL, PROJECTOR),
        loss=functools.partial(_token_loss, terms=("ce",)),
        reads=_CE + _ROUTER,
    ),
    "init": Stage(
        trains=(PROJECTOR,),
        loss=functools.partial(_token_loss, terms=("ce",)),
        reads=_CE + _ROUTER,
    ),
    "d2d": Stage(
        trains=(LANGUAGE_MODEL, PROJECTOR),
        loss=functools.partial(_token_loss, terms=("kd", "image_kd", "relation")),
        reads=_KD + _ON_POLICY + _ROUTER,
        teacher=True,
    ),
    "d2s": Stage(
        trains=(EXPERT_LAYERS, PROJECTOR),
        also=(DENSE_LAYERS,),
        loss=functools.partial(_token_loss, terms=("kd", "ce", "image_kd", "relation")),
        reads=_KD + _CE + _ON_POLICY + _ROUTER,
        teacher=True,
        sparse=True,
    ),
    "preference": Stage(
        trains=(EXPERT_LAYERS, PROJECTOR),
        also=(DENSE_LAYERS,),
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
        expected = f"a model, since stage {config.stage!r} has a teacher"
        raise invalid("config.teacher", config.teacher, expected)
    if config.teacher and not stage.teacher:
        expected = f"'', since stage {config.stage!r} has no teacher"
        raise invalid("config.teacher", config.teacher, expected)
    return stage


def is_cached(config: TrainConfig) -> bool:
    """Returns whether the teacher is a cache."""
    return config.teacher.startswith(CACHED)


def trainable_paths(config: TrainConfig, paths: Sequence[str]) -> set[str]:
    """Those of `paths` that train: the paper's set, the reference's, or the config's patterns.

    Parameters that are never computed are left out: they have no gradient, and would decay.

    Raises:
      UserError: for an unknown set, a pattern that matches nothing, or nothing that is computed.
    """
    origin = "config.trainable"
    found = match(paths, _patterns(config, paths), origin)
    computed = {path for path in found if is_computed(path)}
    if not computed:
        raise invalid(origin, config.trainable, "patterns that match a parameter that is computed")
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
        expected = "'paper', 'reference', or a tuple of patterns of parameter paths"
        raise invalid("config.trainable", chosen, expected)
    return chosen
