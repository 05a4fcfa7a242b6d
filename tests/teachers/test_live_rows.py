"""Rows of a live teacher of another layout, next to those of its student."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from moddistill.config import DataConfig, SourceConfig
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR, preprocess, read_image
from moddistill.data.pipeline import open_sources, plan_rows
from moddistill.data.rows import RowMaker, RowSpec, needed_image_slots
from moddistill.data.token_texts import texts_in_template
from moddistill.errors import UserError
from moddistill.models.batch import LAST, WITHIN, make_batch, sides_of
from moddistill.teachers import live_rows
from moddistill.teachers.live_rows import LiveRows

LENGTH = 1000
RULES = ImageRules(pad_color=PAD_COLOR)
# A space before an answer and 2 patches an image; none and 3 patches.
STUDENT = RowSpec("conversation", "vicuna", LENGTH, 4, 2, RULES)
TEACHER = RowSpec("conversation", "chatml", LENGTH, 6, 3, RULES)
ANSWERS = [["a red bus", "three"], ["猫"], ["no"], ["yes", "and\nno", "猫 and bus"]]


@pytest.fixture
def records(tmp_path):
    """Conversations with one image each, and pairs of answers to the same questions; in other
    files with a last one of text only."""
    Image.new("RGB", (9, 5), (200, 30, 30)).save(tmp_path / "a.png")
    found = []
    for answers in ANSWERS:
        turns = []
        for number, answer in enumerate(answers):
            question = "<image>\nwhat?" if number == 0 else "and this?"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        found.append({"image": "a.png", "conversations": turns})
    pairs = [
        {"image": "a.png", "conversations": x["conversations"][:1], "chosen": "yes", "rejected": no}
        for x, no in zip(found, ["no", "no bus", "猫", "a red bus"], strict=True)
    ]
    hello = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    text = {"conversations": hello}
    text_pair = {"conversations": hello[:1], "chosen": "yes", "rejected": "no"}
    for kind, all_images, last in (("conversation", found, text), ("preference", pairs, text_pair)):
        (tmp_path / f"{kind}.json").write_text(json.dumps(all_images))
        (tmp_path / f"{kind}_and_text.json").write_text(json.dumps([*all_images, last]))
    return tmp_path


@pytest.fixture
def rows_of(records, tokenizer):
    """`rows_of(kind, **changes)`: a function that makes rows, of a teacher with other settings."""

    def make(
        kind="conversation", packing=True, by_rank=False, student="vicuna", file=None, **changes
    ):
        student = dataclasses.replace(STUDENT, kind=kind, template=student)
        teacher = dataclasses.replace(TEACHER, kind=kind, **changes)
        source = SourceConfig(str(records / f"{file or kind}.json"), str(records))
        data = DataConfig(sources={"a": source}, max_length=LENGTH, packing=packing)
        reader = LiveRows(
            teacher,
            tokenizer,
            texts_in_template(tokenizer, teacher.template),
            texts_in_template(tokenizer, student.template),
            teacher.image_size,
            by_rank,
        )
        sources = open_sources(data, student, tokenizer)
        others = open_sources(data, teacher, tokenizer)
        plan = plan_rows(data, sources, 0, others)
        slots = needed_image_slots(sources, packing)
        return RowMaker(plan, sources, tokenizer, student, slots, reader)

    return make


def test_a_row_has_the_shapes_of_a_batch(rows_of):
    for kind in ("conversation", "preference"):
        made = rows_of(kind)
        rows = sides_of(made(0).batch)[0].teacher
        assert set(rows.tokens[rows.segments == 0].tolist()) == {made.teacher.tokenizer.pad_id}
        images = [(made.image_slots, size) for size in (4, 6)]
        shapes = make_batch(
            np.zeros,
            rows=1,
            length=LENGTH,
            images=images[0],
            preference=kind == "preference",
            own_rows=True,
            teacher_images=images[1],
        )
        one = jax.tree.map(lambda x: x[0], shapes)
        chex.assert_trees_all_equal_shapes_and_dtypes(made(0).batch, one)


def test_positions_that_correspond_predict_the_same_text(rows_of):
    made = rows_of()
    batch = made(0).batch
    rows = batch.teacher
    assert batch.segments.max() > 1  # several samples
    at = np.flatnonzero(rows.known)
    its = at + rows.shift[at]
    assert len(set(its.tolist())) == len(at) and (rows.shift[at] != 0).any()
    np.testing.assert_array_equal(batch.segments[at], rows.segments[its])
    mine = made.teacher.student.spell(batch.tokens[at + 1])
    assert mine == made.teacher.texts.spell(rows.tokens[its + 1])
    # All other tokens of answers are in chunks: a space, and the first token after it.
    supervised = np.flatnonzero(batch.loss_mask) - 1
    assert set(supervised) == set(at) | set(np.flatnonzero(rows.chunk))


@pytest.mark.parametrize(
    "templates", [{}, {"student": "chatml", "template": "vicuna"}], ids=["space", "teacher's space"]
)
def test_chunks_have_the_same_text_on_both_sides(rows_of, templates):
    made = rows_of(**templates)
    batch = made(0).batch
    rows = batch.teacher
    ends = np.flatnonzero(rows.chunk == LAST)
    inside = np.flatnonzero(rows.in_chunk)
    targets = inside + rows.chunk_shift[inside]
    assert set(targets.tolist()) == set(ends.tolist()) and len(ends) > 4
    for start, end in zip([-1, *ends], ends, strict=False):
        mine = [at for at in range(start + 1, end + 1) if rows.chunk[at] in (WITHIN, LAST)]
        ours = made.teacher.student.spell(batch.tokens[np.array(mine) + 1])
        theirs = made.teacher.texts.spell(rows.tokens[inside[targets == end] + 1])
        assert sorted([b"".join(ours), b"".join(theirs)]) == [
            b" " + b"".join(ours).strip(),
            b"".join(ours).strip(),
        ]


def test_samples_of_packed_rows_are_those_of_rows_by_themselves(rows_of):
    """Each begins where it does in the student's row, with its own place in the segments."""
    packed, single = rows_of()(0).batch, rows_of(packing=False)
    lone = {
        row.tokens[row.segments > 0].tobytes(): row for row in (single(i).batch for i in range(4))
    }
    for segment in range(1, packed.segments.max() + 1):
        tokens = packed.tokens[packed.segments == segment]
        start = np.flatnonzero(packed.segments == segment)[0]
        own = lone[tokens.tobytes()].teacher
        length = (own.segments > 0).sum()
        assert np.flatnonzero(packed.teacher.segments == segment).tolist() == list(
            range(start, start + length)
        )
        for name in own._fields:
            if name != "segments":
                found = getattr(packed.teacher, name)[start : start + length]
                np.testing.assert_array_equal(found, getattr(own, name)[:length])


def test_a_teacher_reads_images_at_its_own_size_and_with_its_own_padding(rows_of):
    made = rows_of(images=ImageRules(pad_color=(9, 8, 7)))
    batch = made(0).batch
    [image] = made.sources[0][0].images
    expected = preprocess(read_image(image, RULES), 6, (9, 8, 7))
    np.testing.assert_array_equal(batch.teacher_images[0], expected)
    assert batch.images.shape[1:] == (4, 4, 3)


def test_answers_of_pairs_count_at_their_first_position(rows_of):
    made = rows_of("preference")
    batch = made(0).batch
    for side in sides_of(batch):
        rows = side.teacher
        assert rows.known is None and rows.chunk is None
        inside = np.flatnonzero(rows.in_chunk)
        targets = inside + rows.chunk_shift[inside]
        for segment in range(1, side.segments.max() + 1):
            of_answer = np.flatnonzero((side.segments == segment) & side.loss_mask) - 1
            its = targets[rows.segments[inside] == segment]
            assert set(its.tolist()) == {of_answer[0]}
            predicted = inside[rows.segments[inside] == segment] + 1
            texts = made.teacher.texts.spell(rows.tokens[predicted])
            mine = made.teacher.student.spell(side.tokens[of_answer + 1])
            assert b"".join(mine) == b" " + b"".join(texts)


@pytest.mark.parametrize("image_tokens", [1001, 950], ids=["no images", "no answer"])
def test_a_record_that_the_teachers_row_has_no_place_for_is_left_out(rows_of, image_tokens):
    made = rows_of(file="conversation_and_text", packing=False, image_tokens=image_tokens)
    rows = [made(number) for number in range(5)]
    found = [each for row in rows for each in row.rejected]
    assert sorted(each.line for each in found) == [1, 2, 3, 4]
    [reason] = {each.reason.split(", got ")[0] for each in found}
    expected = "all images and an answer token within data.max_length 1000"
    assert reason == f"teacher: expected {expected}"
    for row in rows:
        assert row.batch.loss_mask.any() != bool(row.rejected)
        assert row.batch.teacher.segments.any() != bool(row.rejected)


def test_a_pair_that_the_teachers_row_has_no_place_for_is_left_out(rows_of):
    made = rows_of("preference", packing=False, file="preference_and_text", image_tokens=950)
    rows = [made(number) for number in range(5)]
    assert sum(len(row.rejected) for row in rows) == 4
    for row in rows:
        for each in row.rejected:
            assert "expected both answers within data.max_length 1000" in each.reason
        assert row.batch.chosen.loss_mask.any() != bool(row.rejected)


@pytest.mark.parametrize(
    "is_cut, expected",
    [
        (False, "answer: expected another"),
        (True, "teacher: expected a token of an answer in both rows, got none"),
    ],
)
def test_a_record_that_does_not_align_keeps_its_image_in_the_teachers_row(
    rows_of, monkeypatch, is_cut, expected
):
    """Later samples of the row have the images after it."""
    made = rows_of()
    plain = made(0).batch
    calls = []

    def other_answer(student, teacher, align=live_rows.align):
        calls.append(teacher)
        if len(calls) == 1 and is_cut:
            return []
        if len(calls) == 1:
            raise UserError("answer: expected another")
        return align(student, teacher)

    monkeypatch.setattr(live_rows, "align", other_answer)
    found = made(0)
    assert [each.reason for each in found.without_targets] == [expected]
    rows, others = found.batch.teacher, plain.teacher
    for name in ("tokens", "positions", "segments"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(others, name))
    np.testing.assert_array_equal(found.batch.teacher_images, plain.teacher_images)
    first = plain.segments == 1
    assert not rows.known[first].any() and not rows.chunk[first].any()
    np.testing.assert_array_equal(rows.known[~first], others.known[~first])


def test_both_layouts_fit_their_rows(rows_of):
    """Of 300 patches, two samples of the teacher fit a row, and more of the student would."""
    made = rows_of(image_tokens=300)
    for number in range(2):
        found = made(number)
        assert found.without_targets == ()
        assert 1 <= found.batch.teacher.segments.max() <= 2


def test_by_rank_every_chunk_has_targets_at_its_start(rows_of):
    rows, plain = (rows_of(by_rank=flag)(0).batch.teacher for flag in (True, False))
    assert not rows.chunk.any() and not rows.in_chunk.any()
    starts = np.flatnonzero(rows.known & ~plain.known)
    assert len(starts) == (plain.chunk == LAST).sum() and plain.chunk[starts].all()
    assert (plain.known <= rows.known).all()
