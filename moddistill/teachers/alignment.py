"""Alignment of teacher and student: their token ids, and the positions that they share."""

from typing import NamedTuple

import numpy as np

from moddistill.config import DistillationConfig, TrainConfig
from moddistill.data.records import IMAGE
from moddistill.data.token_texts import TokenTexts
from moddistill.data.tokenizer import CONTROLS, Tokenizer
from moddistill.errors import UserError, invalid
from moddistill.models.vocabulary import IdRanges, id_ranges
from moddistill.teachers.targets import NO_ID
from moddistill.teachers.token_classes import token_classes


class IdMap(NamedTuple):
    """Ids of a teacher's tokens in the student's vocabulary.

    Attributes:
      to_student: int32 of each id of the teacher; `NO_ID` for tokens that the student lacks. With
        another vocabulary, one id of the student stands for the class of a token.
      is_shared: whether the teacher has all texts of the student, with the same ids. Others, which
        only the teacher has, are control tokens or additions then.
      classes: int32 of each id of the student, the one that stands for its class; None if shared.
    """

    to_student: np.ndarray
    is_shared: bool
    classes: np.ndarray | None = None

    def ids_of_student(self) -> IdRanges:
        """Returns the ids of the student that the teacher has too."""
        return id_ranges(self.to_student[self.to_student != NO_ID].tolist())


def id_map(teacher: TokenTexts, student: TokenTexts) -> IdMap:
    """Returns the ids of tokens of equal text, of equal control tokens, and of ends of answers.

    Where ends of answers are different tokens, their ids are exchanged. Of another vocabulary, the
    classes of `token_classes` take the place of ids with text.
    """
    # Of several ids with one text the last counts: in SentencePiece, bytes come before characters.
    of_text = {text: id for id, text in enumerate(student.texts) if text is not None}
    by_text = {text: id for id, text in enumerate(teacher.texts) if text is not None}
    to_student = np.full(_size(teacher), NO_ID, np.int32)
    for text, id in by_text.items():
        to_student[id] = of_text.get(text, NO_ID)
    same = to_student[: len(teacher.texts)]
    has_same_ids = bool(np.all((same == NO_ID) | (same == np.arange(len(same)))))
    texts = of_text.keys(), by_text.keys()
    is_shared = has_same_ids and texts[0] <= texts[1]
    for name, id in teacher.controls.items():
        to_student[id] = student.controls.get(name, NO_ID)
    if None not in (teacher.end, student.end):
        to_student[to_student == student.end] = to_student[teacher.end]
        to_student[teacher.end] = student.end
    if is_shared:
        return IdMap(to_student, is_shared)
    of_teacher, of_student = token_classes(teacher.texts, student.texts)
    for id, name in of_teacher.items():
        to_student[id] = name
    others = np.arange(len(of_student), _size(student), dtype=np.int32)
    return IdMap(to_student, is_shared, np.concatenate([of_student, others]))


def _size(texts: TokenTexts) -> int:
    return max([len(texts.texts) - 1, *texts.controls.values()]) + 1


def shared_ids(
    teacher: Tokenizer, student: Tokenizer, origin: str, own_tokens: bool = False
) -> IdRanges:
    """Returns the ids of tokens in both vocabularies; losses compare the two models on these.

    A control token that no template uses may be missing on one side: no sample contains it.

    Args:
      origin: name of the teacher, for messages.
      own_tokens: whether the teacher reads records in its own tokens. Then it may have added ones
        that the student lacks, and another id of `<image>`.

    Raises:
      UserError: another token is missing on one side, or a token has two ids.
    """
    teacher_ids, student_ids = teacher.backend.get_vocab(), student.backend.get_vocab()
    optional = teacher.special_tokens | student.special_tokens
    if own_tokens:
        optional |= {each.content for each in teacher.backend.get_added_tokens_decoder().values()}
    one_sided = optional - set(CONTROLS) - (teacher_ids.keys() & student_ids.keys())
    if own_tokens:
        one_sided |= {IMAGE}
    different = [
        token
        for token in (teacher_ids.keys() | student_ids.keys()) - one_sided
        if teacher_ids.get(token) != student_ids.get(token)
    ]
    if different:
        token = min(different)
        raise UserError(
            f"vocabulary of {origin!r}: expected the student's id {student_ids.get(token)} for "
            f"token {token!r}, got {teacher_ids.get(token)}"
        )
    # `<image>` is an input only: a prediction of it would be no text.
    same = {i for token, i in student_ids.items() if teacher_ids.get(token) == i}
    return id_ranges(same - {student.image_id})


def check_answer_positions(config: TrainConfig, reason: str) -> None:
    """Raises UserError for a divergence at other positions than those of answers.

    Args:
      reason: why there is none, which ends the message.
    """
    for name in ("kd_positions", "kd_shift", "image_kd_weight", "relation_weight"):
        value, default = (getattr(x, name) for x in (config.distillation, DistillationConfig()))
        if value != default:
            raise invalid(f"config.distillation.{name}", value, f"{default!r}, {reason}")
