"""The models of a run, each spec resolved once, and the architecture that its stage trains."""

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

from moddistill.config import TrainConfig
from moddistill.convert.resolve import (
    RANDOM,
    ResolvedModel,
    resolve,
)
from moddistill.data.token_texts import TokenTexts, texts_in_template
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError, at_field, invalid
from moddistill.losses.divergences import SAMPLED_DIVERGENCES
from moddistill.models.upcycle import check_upcycle, upcycle_config
from moddistill.models.vlm import ModelConfig
from moddistill.teachers.alignment import IdMap, id_map
from moddistill.teachers.cache import CACHED, TeacherCache
from moddistill.teachers.live import has_own_layout, teacher_architecture
from moddistill.training.stages import is_cached, stage_of

LOG = logging.getLogger("moddistill")


class Models(NamedTuple):
    """The models of a run, each spec resolved once.

    Attributes:
      tokenizer: of the student.
      student: what `config.student` names.
      vision: what `config.vision` names, if anything.
      teacher: the model that `config.teacher` names, if any.
      student_config: the architecture that the stage trains.
      teacher_config: the teacher's, with the token ids that it shares with the student.
      teacher_tokenizer: of a live teacher.
      cache: the cache that `config.teacher` names, if any.
      ids: from its teacher's ids to those of the student.
      texts: of the student's tokens, if the teacher's may be others.
    """

    tokenizer: Tokenizer
    student: ResolvedModel
    vision: ResolvedModel | None
    teacher: ResolvedModel | None
    student_config: ModelConfig
    teacher_config: ModelConfig | None
    teacher_tokenizer: Tokenizer | None
    cache: TeacherCache | None
    ids: IdMap | None
    texts: TokenTexts | None

    @property
    def has_own_layout(self) -> bool:
        """Whether a live teacher reads other tokens or images than the student."""
        teacher = self.teacher_config
        return teacher is not None and has_own_layout(teacher, self.student_config)


def resolve_models(config: TrainConfig) -> Models:
    """Resolves student, vision encoder and teacher, and checks that they fit each other.

    Raises:
      UserError: naming the setting of a model that does not exist or does not fit.
    """
    student, tokenizer = student_of(config)
    vision = teacher = teacher_config = its_tokenizer = cache = ids = texts = None
    if config.vision:
        with at_field("config.vision"):
            vision = resolve(config.vision, tokenizer)
    target = trained_architecture(config, student.config, vision.config if vision else None)
    if is_cached(config):
        with at_field("config.teacher"):
            cache = TeacherCache(Path(config.teacher.removeprefix(CACHED)))
            texts = texts_in_template(tokenizer, config.data.template)
            ids = id_map(cache.texts, texts)
            _check_vocabulary(config, cache, ids)
        _check_divergence(config, cache)
    elif config.teacher:
        with at_field("config.teacher"):
            teacher = resolve(config.teacher, tokenizer)
            its_tokenizer = tokenizer
            if teacher.folder is not None:
                its_tokenizer = load_tokenizer(str(teacher.folder))
            # Compared with `target`, since a text-only student gets its encoder in this stage.
            teacher_config = teacher_architecture(config, teacher, target, its_tokenizer, tokenizer)
            if has_own_layout(teacher_config, target):
                texts = texts_in_template(tokenizer, config.data.template)
    _warn_of_template(config, student)
    return Models(
        tokenizer,
        student,
        vision,
        teacher,
        target,
        teacher_config,
        its_tokenizer,
        cache,
        ids,
        texts,
    )


def _check_divergence(config: TrainConfig, cache: TeacherCache) -> None:
    """Raises UserError for a divergence that drawn ids give no estimate of."""
    value = config.distillation.divergence
    if cache.shape.kind == "samples" and value not in SAMPLED_DIVERGENCES:
        expected = (
            f"one of {', '.join(SAMPLED_DIVERGENCES)}, which drawn ids estimate, or a cache made "
            "with --top_k"
        )
        raise invalid("config.distillation.divergence", value, expected)


def _check_vocabulary(config: TrainConfig, cache: TeacherCache, ids: IdMap) -> None:
    """Raises UserError for drawn ids of another vocabulary."""
    if cache.shape.kind == "samples" and not ids.is_shared:
        raise UserError(
            "expected a cache made with --top_k for a teacher of another vocabulary than the "
            f"student's, got one of drawn ids, {str(cache.folder)!r}"
        )


def student_of(config: TrainConfig) -> tuple[ResolvedModel, Tokenizer]:
    """The student with the tokenizer of its folder, or of `config.tokenizer` for new weights."""
    if not config.student.startswith(RANDOM):
        if config.tokenizer:
            expected = f"'', since the student {config.student!r} has its own"
            raise invalid("config.tokenizer", config.tokenizer, expected)
        with at_field("config.student"):
            student = resolve(config.student)
            return student, load_tokenizer(str(student.folder))
    if not config.tokenizer:
        expected = f"a tokenizer folder, since the student is {config.student!r}"
        raise invalid("config.tokenizer", config.tokenizer, expected)
    with at_field("config.tokenizer"):
        tokenizer = load_tokenizer(config.tokenizer)
    with at_field("config.student"):
        return resolve(config.student, tokenizer), tokenizer


def trained_architecture(
    config: TrainConfig, base: ModelConfig, tower: ModelConfig | None
) -> ModelConfig:
    """Returns the student's architecture with the stage's template, vision encoder and experts.

    Args:
      base: the student as `config.student` names it.
      tower: the model whose vision encoder a text-only student gets, if any.

    Raises:
      UserError: for a vision encoder too many or missing, or experts that do not fit.
    """
    target = dataclasses.replace(base, template=config.data.template)
    if tower is not None:
        if base.vision is not None:
            expected = f"'', since the student {config.student!r} has a vision encoder"
            raise invalid("config.vision", config.vision, expected)
        if tower.vision is None:
            raise invalid("config.vision", config.vision, "a model with a vision encoder")
        is_new = config.student.startswith(RANDOM)
        rows = base.decoder.vocab_size
        if not is_new and base.image_token_id >= rows:
            expected = (
                f"a student imported with --vision, which adds an embedding row for <image> (id "
                f"{base.image_token_id}, {rows} rows)"
            )
            raise invalid("config.student", config.student, expected)
        target = dataclasses.replace(target, vision=tower.vision)
    _check_image_terms(config, target)
    if not stage_of(config).sparse:
        return target
    with at_field("config.upcycle"):
        check_upcycle(config.upcycle)
    with at_field("config.student" if base.decoder.moe else "config.moe"):
        return upcycle_config(target, config.moe)


def _check_image_terms(config: TrainConfig, student: ModelConfig) -> None:
    """Raises UserError for losses at image positions of a student without a vision encoder."""
    for name in ("image_kd_weight", "relation_weight"):
        value = getattr(config.distillation, name)
        if value and student.vision is None:
            expected = f"0.0, since the student {config.student!r} has no vision encoder"
            raise invalid(f"config.distillation.{name}", value, expected)


def _warn_of_template(config: TrainConfig, student: ResolvedModel) -> None:
    """Logs a warning if a trained student is distilled in another template than its own."""
    trained = config.teacher and student.folder is not None
    if trained and student.config.template != config.data.template:
        LOG.warning(
            "config.data.template is %r, but the student %r was trained with %r: it learns the "
            "other format in this stage, and its model folder will name that",
            config.data.template,
            config.student,
            student.config.template,
        )
