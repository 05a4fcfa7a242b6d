"""Alignment of teacher and student: equal token ids, equal conversation template."""

from moddistill.config import TrainConfig
from moddistill.data.tokenizer import CONTROLS, Tokenizer
from moddistill.errors import UserError, invalid
from moddistill.models.vocabulary import IdRanges, id_ranges


def shared_ids(teacher: Tokenizer, student: Tokenizer, origin: str) -> IdRanges:
    """Returns the ids of tokens in both vocabularies; losses compare the two models on these.

    A control token that no template uses may be missing on one side: no sample contains it.

    Args:
      origin: name of the teacher, for messages.

    Raises:
      UserError: another token is missing on one side, or a token has two ids.
    """
    teacher_ids, student_ids = teacher.backend.get_vocab(), student.backend.get_vocab()
    optional = (teacher.special_tokens | student.special_tokens) - set(CONTROLS)
    one_sided = optional - (teacher_ids.keys() & student_ids.keys())
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


def check_template(config: TrainConfig, trained_with: str) -> None:
    """Raises UserError unless records are rendered in the template of the teacher's training.

    In another template the teacher's predictions are for text unlike any that it has seen.
    """
    if config.data.template != trained_with:
        raise invalid(
            "config.data.template",
            config.data.template,
            f"{trained_with!r}, the template of the teacher {config.teacher!r} (or the teacher "
            f"imported with --template {config.data.template})",
        )
