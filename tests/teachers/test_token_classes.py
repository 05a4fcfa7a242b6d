"""Classes of tokens of two vocabularies."""

import numpy as np
import pytest

from moddistill.data.token_texts import texts_in_template
from moddistill.data.tokenizer import train_bpe
from moddistill.teachers.text_chunks import align
from moddistill.teachers.token_classes import token_classes

WORDS = [
    "red",
    "circle",
    "cyan",
    "rectangle",
    "yes",
    "no",
    "yellow",
    "is",
    "the",
    "there",
    "a",
    "shape",
    "code",
    "return",
]


def test_tokens_that_begin_with_one_another_are_one_class():
    student = [b"c", b"o", b"i", b"circle", b"x", None, b"xy", b"y"]
    teacher = [b"i", b"c", b"ci", b"co", b"x", b"o", b"", b"z"]
    of_teacher, of_student = token_classes(teacher, student)
    # `circle` begins with `ci`, which the student writes as `c` and `i`, and so does `co`.
    assert of_student.tolist() == [0, 1, 2, 0, 4, 5, 4, 7]
    assert of_teacher == {1: 0, 2: 0, 3: 0, 0: 2, 4: 4, 5: 1}


def test_one_vocabulary_has_a_class_for_each_token():
    tokenizer = train_bpe([" ".join(WORDS) * 3], 300)
    texts = texts_in_template(tokenizer, "chatml").texts
    of_teacher, of_student = token_classes(texts, texts)
    assert all(of_student[id] == id for id in of_teacher.values())
    assert of_teacher == {id: id for id, text in enumerate(texts) if text}


@pytest.mark.parametrize("seed", range(5))
def test_both_write_the_same_text_with_tokens_of_the_same_class(seed):
    """Wherever they have read the same text: at the beginnings of chunks."""
    rng = np.random.default_rng(seed)
    corpora = (
        " ".join(rng.choice(WORDS, 200)),
        " ".join(rng.choice([*WORDS[:5], "tree", "to"], 90)),
    )
    sides = [
        train_bpe([corpus], 256 + 3 + count)
        for corpus, count in zip(corpora, (60, 25), strict=True)
    ]
    student, teacher = (texts_in_template(side, "chatml") for side in sides)
    of_teacher, of_student = token_classes(teacher.texts, student.texts)
    text = "a " + " ".join(rng.choice(WORDS, 50))
    ids = [side.encode(text) for side in sides]
    texts = [side.spell(np.array(x)) for side, x in zip((student, teacher), ids, strict=True)]
    chunks = align(*texts)
    assert any(not chunk.is_token for chunk in chunks)
    for chunk in chunks:
        mine, other = ids[0][chunk.student.start], ids[1][chunk.teacher.start]
        assert of_student[mine] == of_teacher[other]
