"""Prompts that begin alike: which ones are read together, and what is read once."""

import dataclasses

import pytest
from PIL import Image

from moddistill.convert.resolve import load
from moddistill.errors import UserError
from moddistill.inference import batching, generation, table
from moddistill.inference.answer import Decoding, Writing
from moddistill.inference.beginnings import runs_of
from moddistill.inference.generation import answer, generate
from moddistill.inference.prompts import Prompt
from tests.calls import count_calls
from tests.inference.same_answers import assert_same_answers

IMAGE_ID = 9
DECODING = Decoding(max_new_tokens=2)


def found_runs(prompts, ids, shares=True):
    writings = [Writing(number, prompt, DECODING) for number, prompt in enumerate(ids)]
    runs = runs_of(writings, prompts, IMAGE_ID, shares)
    return [([writing.number for writing in run.writings], run.shared) for run in runs]


def test_prompts_with_the_same_images_and_tokens_up_to_the_last_one_are_a_run():
    prompts = [Prompt("", ("a.png",))] * 3 + [Prompt("", ("b.png",))] * 2
    ids = [[1, 9, 9, 2], [1, 9, 9, 3, 4], [5, 9, 9, 2], [1, 9, 9, 2], [1, 9, 9, 2]]
    assert found_runs(prompts, ids) == [([1, 0], 3), ([3, 4], 3), ([2], 0)]


def test_texts_are_read_as_a_whole():
    assert found_runs([Prompt("")] * 2, [[1, 2, 3]] * 2) == [([0], 0), ([1], 0)]


def test_runs_that_share_come_first_and_then_those_with_long_prompts():
    prompts = [Prompt("", (name,)) for name in "aabb"]
    ids = [[9, 1], [9, 1, 2], [9, 1, 2, 3], [9, 1]]
    assert found_runs(prompts, ids) == [([2, 3], 1), ([1, 0], 1)]
    prompts, ids = [Prompt(""), *prompts, Prompt("")], [[1], *ids, [1] * 9]
    assert found_runs(prompts, ids) == [([3, 4], 1), ([2, 1], 1), ([5], 0), ([0], 0)]


def test_without_sharing_each_prompt_is_a_run():
    prompts = [Prompt("", ("a.png",))] * 2
    assert found_runs(prompts, [[9, 1]] * 2, shares=False) == [([0], 0), ([1], 0)]


def test_a_prompt_that_ends_with_its_image_is_read_as_a_whole():
    """Something has to be read after a beginning, for the first token of the answer."""
    prompts = [Prompt("", ("a.png",))] * 2
    assert found_runs(prompts, [[1, 9, 9]] * 2) == [([0], 0), ([1], 0)]


def test_images_in_memory_are_the_same_if_they_are_one_object():
    first, second = (Image.new("RGB", (2, 2)) for _ in range(2))
    prompts = [Prompt("", (first,)), Prompt("", (second,)), Prompt("", (first,))]
    assert found_runs(prompts, [[9, 1]] * 3) == [([0, 2], 1), ([1], 0)]


@pytest.fixture
def dense(tiny_models, tokenizer):
    return (*load(tiny_models["dense"], stacked=False), tokenizer)


def one_by_one(model, prompts, decoding=DECODING):
    """Answers to prompts of which none is asked with another."""
    return [answer(*model, [prompt], decoding)[0] for prompt in prompts]


@pytest.mark.parametrize("rows", [1, 2, 256])
def test_an_image_is_read_once_for_its_questions(dense, image, monkeypatch, rows):
    """One row is all that fits the memory: there, prompts are read one by one."""
    monkeypatch.setattr(batching, "MAX_ROWS", rows)
    read = count_calls(monkeypatch, generation, "load_images")
    prompts = [Prompt(f"<image>\nwhat is at {n}?", (image(n % 2),)) for n in range(8)]
    together = answer(*dense, prompts, DECODING)
    assert len(read) == (8 if rows == 1 else 2)
    assert_same_answers(together, one_by_one(dense, prompts))


def test_each_question_follows_its_own_image_of_several_that_are_read_together(
    dense, image, monkeypatch
):
    """32 rows leave memory for four beginnings at a time."""
    read = count_calls(monkeypatch, table, "read_beginnings")
    prompts = [Prompt(f"<image>\nwhat is at {n % 8}?", (image(n // 8),)) for n in range(32)]
    together = answer(*dense, prompts, DECODING)
    assert [len(batch.tokens) for _, _, batch in read] == [4]
    assert_same_answers(together[::8], one_by_one(dense, prompts[::8]))


@pytest.mark.slow
def test_a_row_whose_answer_ends_gets_the_next_question_of_an_image(dense, image, monkeypatch):
    """Questions about one image wait for no more rows than others do."""
    monkeypatch.setattr(batching, "MAX_ROWS", 4)
    prompts = [Prompt(f"<image>\nwhat is at {n}?", (image(0),)) for n in range(12)]
    decoding = Decoding(max_new_tokens=8)
    first, *_ = answer(*dense, prompts, decoding)
    monkeypatch.setattr(generation, "end_id", lambda *_: first.token_ids[3])
    steps = count_calls(monkeypatch, table, "step")
    together = answer(*dense, prompts, decoding)
    assert len({len(each.token_ids) for each in together}) > 1
    count = len(steps)
    monkeypatch.setattr(generation, "runs_of", lambda *args: runs_of(*args[:-1], shares=False))
    answer(*dense, prompts, decoding)
    assert count <= len(steps) - count + 1


@pytest.mark.slow
def test_tokens_that_are_read_together_are_bounded(dense, image, monkeypatch):
    """Each rest has a copy of its beginning."""
    monkeypatch.setattr(table, "MOST_TOKENS", 800)
    read = count_calls(monkeypatch, table, "admit")
    prompts = [Prompt(f"<image>\nwhat is at {n}?", (image(0),)) for n in range(12)]
    prompts += [Prompt("one " * 150), *[Prompt(f"{n}?") for n in range(12)]]
    answer(*dense, prompts, DECODING)
    assert max(len(batch.tokens) for _, _, _, batch, *_ in read) > 1
    for _, _, _, batch, *_, shared in read:
        longest = batch.segments.sum(1).max()
        if shared is not None:
            longest = shared.batch.tokens.shape[1] + batch.tokens.shape[1]
        assert len(batch.tokens) == 1 or len(batch.tokens) * longest <= 800


@pytest.mark.slow
@pytest.mark.parametrize(("spare", "together"), [(0, 4), (-1, 1)])
def test_a_program_reads_a_power_of_four_prompts_up_to_the_bound(
    dense, monkeypatch, spare, together
):
    prompts = [Prompt("what?")] * 4
    tokens = len(one_by_one(dense, prompts[:1])[0].prompt_ids)
    monkeypatch.setattr(table, "MOST_TOKENS", 4 * tokens + spare)
    read = count_calls(monkeypatch, table, "admit")
    answer(*dense, prompts, DECODING)
    assert [len(batch.tokens) for _, _, _, batch, *_ in read] == [together] * (4 // together)


def test_prompts_of_more_tokens_than_are_read_together_are_read_one_by_one(
    dense, image, monkeypatch
):
    prompts = [Prompt(f"<image>\nwhat is at {n}?", (image(0),)) for n in range(3)]
    prompts += [Prompt(f"{n}?") for n in range(3)]
    expected = one_by_one(dense, prompts)
    monkeypatch.setattr(table, "MOST_TOKENS", 8)
    assert_same_answers(answer(*dense, prompts, DECODING), expected)


def test_prompts_of_the_plain_template_that_are_equal(dense, image):
    model, params, tokenizer = dense
    plain = model.clone(config=dataclasses.replace(model.config, template="plain"))
    loaded = plain, params, tokenizer
    prompts = [Prompt("<image>\nwhat?", (image(0),))] * 4
    assert_same_answers(answer(*loaded, prompts, DECODING), one_by_one(loaded, prompts))


def test_an_image_that_cannot_be_read_fails_all_its_questions_and_no_others(dense, image, tmp_path):
    missing = str(tmp_path / "missing.png")
    prompts = [
        Prompt(f"<image>\nwhat is at {n}?", (missing if n % 2 else image(0),)) for n in range(6)
    ]
    failed = {}
    found = dict(generate(*dense, prompts, DECODING, failed.__setitem__))
    assert sorted(failed) == [1, 3, 5]
    assert sorted(found) == [0, 2, 4]
    assert all(isinstance(error, UserError) for error in failed.values())


@pytest.mark.slow
def test_a_longer_beginning_than_the_rests_leave_slots_for(dense, image):
    """Beginning and rest are padded each: together they may be longer than a row."""
    prompts = [Prompt(f"{'so ' * n}<image>\n?", (image(0),)) for n in (1, 1, 9, 9, 17, 17)]
    short = Decoding(max_new_tokens=1)
    assert_same_answers(answer(*dense, prompts, short), one_by_one(dense, prompts, short))
