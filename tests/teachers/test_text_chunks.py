"""Alignment of tokenizations, on small cases and on the tokenizer of Qwen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moddistill.data.examples import encode_sides
from moddistill.data.image_files import ImageFile
from moddistill.data.records import Record
from moddistill.data.token_texts import END, token_texts
from moddistill.data.tokenizer import load_tokenizer, train_bpe
from moddistill.errors import UserError
from moddistill.teachers.text_chunks import align
from tests.data import qwen_ranks

TURNS = [
    ("<image>\nWhat is in the image?", "A red bus in front of 3 houses (built in 1987)."),
    ("图片里有什么？", "图片中有三个人，他们在打篮球。"),
    ("<image>How many?", "42"),
    ("是猫吗？", "猫"),
    ("Write code.", "```python\nprint('hé')\n```\n\n🙂 done"),
]


def spans(chunks):
    return [((c.student.start, c.student.stop), (c.teacher.start, c.teacher.stop)) for c in chunks]


def test_tokens_are_grouped_up_to_common_ends():
    chunks = align([b"ab", b"c", b"d", END], [b"a", b"bc", b"d", END])
    assert spans(chunks) == [((0, 2), (0, 2)), ((2, 3), (2, 3)), ((3, 4), (3, 4))]
    assert [chunk.is_token for chunk in chunks] == [False, True, True]


@pytest.mark.parametrize("swap", [False, True])
def test_a_space_before_an_answer_is_in_its_first_chunk(swap):
    sides = [b" ", b"4", b"2", END], [b"4", b"2", END]
    chunks = align(*(reversed(sides) if swap else sides))
    expected = [((0, 2), (0, 1)), ((2, 3), (1, 2)), ((3, 4), (2, 3))]
    assert spans(chunks) == [pair[::-1] for pair in expected] if swap else expected


def test_an_answer_that_begins_with_a_space_itself_keeps_it():
    assert [chunk.is_token for chunk in align([b"  ", b"a"], [b" ", b"a"])] == [False, True]


@pytest.mark.parametrize(
    "teacher", [[b"a", b"c", END], [b"a", END, b"b", END], [b"b", END], [b"ab", END, b"d", END]]
)
def test_other_answers_are_refused(teacher):
    with pytest.raises(UserError, match=r"answer: expected '.*' as the student reads it, got '"):
        align([b"a", b"b", END, b"c", END], teacher)


def test_truncated_answers_are_aligned_as_far_as_both_go():
    whole, part = [b"a", END, b"bc", b"d", END], [b"a", END, b"b"]
    assert spans(align(whole, part)) == [((0, 1), (0, 1)), ((1, 2), (1, 2))]
    assert spans(align(part, whole)) == [((0, 1), (0, 1)), ((1, 2), (1, 2))]
    assert len(align(whole, [*part[:2], b"bc", b"d"])) == 4


@given(st.text(min_size=1, max_size=30), st.data())
def test_every_token_is_in_one_chunk_of_equal_bytes(text, data):
    def divided():
        raw = text.encode()
        ends = data.draw(st.sets(st.integers(1, len(raw))))
        ends = sorted({*ends, len(raw)})
        return [raw[a:b] for a, b in zip([0, *ends], ends, strict=False)] + [END]

    a, b = divided(), divided()
    chunks = align(a, b)
    for side, tokens in ((lambda c: c.student, a), (lambda c: c.teacher, b)):
        assert [i for chunk in chunks for i in side(chunk)] == list(range(len(tokens)))
    for chunk in chunks:
        assert b"".join(a[i] for i in chunk.student) == b"".join(b[i] for i in chunk.teacher)
        if chunk.is_token:
            assert len(chunk.student) == len(chunk.teacher) == 1


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    qwen_ranks.write_tokenizer_json(folder)
    return load_tokenizer(str(folder))


def supervised(tokenizer, template, end, image_tokens):
    record = Record(
        "a.json", 1, "a", (ImageFile("", "a.png"), ImageFile("", "b.png")), tuple(TURNS)
    )
    [side] = encode_sides(record, template, tokenizer, image_tokens)
    return token_texts(tokenizer.backend, end).spell(side.tokens[side.loss_mask])


def test_all_answer_tokens_align_between_templates_and_image_sizes(qwen):
    """A teacher of SigLIP-384 in `chatml`, a student of CLIP-336 in `vicuna`; English, Chinese."""
    student = supervised(qwen, "vicuna", "<|endoftext|>", 576)
    teacher = supervised(qwen, "chatml", "<|im_end|>", 729)
    chunks = align(student, teacher)
    assert [i for chunk in chunks for i in chunk.student] == list(range(len(student)))
    others = [chunk for chunk in chunks if not chunk.is_token]
    assert len(others) == len(TURNS)  # the first of each answer, after the space of `vicuna`
    same = align(supervised(qwen, "chatml", "<|im_end|>", 576), teacher)
    assert all(chunk.is_token for chunk in same)


def test_all_answer_tokens_align_with_another_vocabulary(qwen):
    other = train_bpe(["a red bus, blue houses in front of it. 图片中有 他们在 " * 3], 330)
    student = supervised(qwen, "chatml", "<|im_end|>", 576)
    teacher = supervised(other, "chatml", "<|im_end|>", 729)
    chunks = align(student, teacher)
    assert [i for chunk in chunks for i in chunk.student] == list(range(len(student)))
    assert [i for chunk in chunks for i in chunk.teacher] == list(range(len(teacher)))
    assert 0.1 < np.mean([chunk.is_token for chunk in chunks]) < 0.9
