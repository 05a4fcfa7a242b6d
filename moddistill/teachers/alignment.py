"""Which ids teacher and student share."""

from moddistill.data.tokenizer import CONTROLS, Tokenizer
from moddistill.errors import UserError
from moddistill.models.vocabulary import IdRanges, id_ranges


def shared_ids(teacher: Tokenizer, student: Tokenizer, origin: str) -> IdRanges:
    """Ids of the tokens that both have; losses compare the two models on these.

    A control token that no template uses may be missing on one side: no sample contains it.

    Raises:
      UserError: if another token is missing on one side, or one has two ids.
    """
    theirs, ours = teacher.backend.get_vocab(), student.backend.get_vocab()
    optional = (teacher.special_tokens | student.special_tokens) - set(CONTROLS)
    one_sided = {token for token in optional if token not in theirs or token not in ours}
    different = [
        token
        for token in (theirs.keys() | ours.keys()) - one_sided
        if theirs.get(token) != ours.get(token)
    ]
    if different:
        token = min(different)
        raise UserError(
            f"teacher {origin!r} has another vocabulary: token {token!r} is {theirs.get(token)} "
            f"there and {ours.get(token)} in the student; accepted: equal token ids"
        )
    same = {i for token, i in ours.items() if theirs.get(token) == i}
    return id_ranges(same - {student.image_id})
