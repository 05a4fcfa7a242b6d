import dataclasses

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from moddistill.data.examples import ExampleSpec, encode_prompt, make_example, make_preference
from moddistill.data.images import preprocess
from moddistill.data.records import PreferencePair, Record
from moddistill.models.batch import make_batch

SPEC = ExampleSpec("vicuna", max_length=80, max_images=2, image_size=4, image_tokens=3)


def record(turns, images=()):
    return Record("f", 1, "1", tuple(images), tuple(turns))


def pair(question, chosen, rejected, history=(), images=()):
    return PreferencePair("f", 1, "1", tuple(images), tuple(history), question, chosen, rejected)


def example(*arguments):
    return make_example(*arguments)[0]


def preference(*arguments):
    return make_preference(*arguments)[0]


def real(sample):
    """Returns the tokens that are not padding."""
    return sample.tokens[sample.segments == 1].tolist()


def supervised(sample):
    return sample.tokens[sample.loss_mask].tolist()


def test_image_placeholder_is_repeated_per_patch_and_the_row_is_padded(qwen, image_file):
    path = image_file(width=9, height=5)
    sample, length = make_example(record([("<image>\nWhat?", "A dog.")], [path]), qwen, SPEC)
    text = "A chat between a curious user and an artificial intelligence assistant. The assistant "
    text += "gives helpful, detailed, and polite answers to the user's questions. USER: "
    answer = [*qwen.encode(" A dog."), qwen.pad_id]
    expected = qwen.encode(text) + [qwen.image_id] * 3 + qwen.encode("\nWhat? ASSISTANT:") + answer
    rest = SPEC.max_length - len(expected)
    assert sample.tokens.tolist() == expected + [qwen.pad_id] * rest
    first = len(expected) - len(answer)
    mask = [False] * first + [True] * len(answer) + [False] * rest
    assert sample.loss_mask.tolist() == mask
    assert sample.segments.tolist() == [1] * len(expected) + [0] * rest
    assert sample.positions.tolist() == list(range(80))
    np.testing.assert_array_equal(sample.images[0], preprocess(Image.open(path), 4))
    assert not sample.images[1].any()
    assert length == len(expected)
    batch = make_batch(np.zeros, rows=1, length=80, images=(2, 4))
    chex.assert_trees_all_equal_shapes_and_dtypes(sample, jax.tree.map(lambda x: x[0], batch))


def test_images_are_padded_with_the_mean_colour_of_the_vision_encoder(qwen, image_file):
    path, spec = image_file(width=9, height=5), dataclasses.replace(SPEC, pad_color=(9, 8, 7))
    sample = example(record([("<image>\nWhat?", "A dog.")], [path]), qwen, spec)
    expected = preprocess(Image.open(path), 4, (9, 8, 7))
    np.testing.assert_array_equal(sample.images[0], expected)
    assert np.any(expected != preprocess(Image.open(path), 4))


def test_images_keep_their_order_and_positions(qwen, image_file):
    paths = [image_file("a.png", seed=1), image_file("b.png", seed=2)]
    sample = example(record([("<image> or <image>?", "No.")], paths), qwen, SPEC)
    where = np.flatnonzero(sample.tokens == qwen.image_id)
    assert (np.diff(where) == 1).tolist() == [True, True, False, True, True]
    for slot, path in enumerate(paths):
        np.testing.assert_array_equal(sample.images[slot], preprocess(Image.open(path), 4))


def test_sample_without_images_has_empty_image_slots_unless_text_only(qwen):
    sample = example(record([("q", "a")]), qwen, SPEC)
    assert sample.images.shape == (2, 4, 4, 3)
    assert not sample.images.any()
    text_only = dataclasses.replace(SPEC, image_tokens=0)
    assert example(record([("q", "a")]), qwen, text_only).images is None


def test_long_answer_is_truncated(qwen):
    turns = [("q", "word " * 100)]
    full = example(record(turns), qwen, dataclasses.replace(SPEC, max_length=200))
    truncated = example(record(turns), qwen, SPEC)
    for name in ("tokens", "loss_mask", "segments"):
        np.testing.assert_array_equal(getattr(truncated, name), getattr(full, name)[:80])
    assert truncated.loss_mask[-1]
    assert qwen.pad_id not in truncated.tokens


def test_truncation_requires_at_least_one_supervised_token(qwen):
    ids = example(record([("q", "a")]), qwen, SPEC)
    first = int(np.flatnonzero(ids.loss_mask)[0])
    truncated = example(record([("q", "a")]), qwen, dataclasses.replace(SPEC, max_length=first + 1))
    assert supervised(truncated) == qwen.encode(" a")
    with pytest.raises(ValueError, match=f"an answer token within max_length {first}, got "):
        example(record([("q", "a")]), qwen, dataclasses.replace(SPEC, max_length=first))


def test_image_is_never_truncated(qwen, image_file):
    turns = [("q", "a"), ("<image> q", "a")]
    sample = example(record(turns, [image_file()]), qwen, SPEC)
    last = int(np.flatnonzero(sample.tokens == qwen.image_id)[-1])
    for length in (last, last - 1, last - 2, last - 4):
        with pytest.raises(ValueError, match="expected all images within max_length"):
            spec = dataclasses.replace(SPEC, max_length=length)
            example(record(turns, [image_file()]), qwen, spec)
    spec = dataclasses.replace(SPEC, max_length=last + 1)
    assert example(record(turns, [image_file()]), qwen, spec).tokens[-1] == qwen.image_id


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (3, {}, "images of the record: expected <= max_images 2, got 3"),
        (
            1,
            {"image_tokens": 0},
            "images of the record: expected none for a text-only model, got 1",
        ),
    ],
)
def test_too_many_images_are_an_error(count, changes, message, qwen, image_file):
    question, images = "<image>" * count, [image_file()] * count
    spec = dataclasses.replace(SPEC, **changes)
    with pytest.raises(ValueError, match=message):
        example(record([(question, "a")], images), qwen, spec)
    with pytest.raises(ValueError, match=message):
        preference(pair(question, "a", "b", images=images), qwen, spec)


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_preference_sides_differ_only_in_the_last_answer(template, qwen, image_file):
    spec = dataclasses.replace(SPEC, template=template)
    history = [("<image>\nWhat?", "A dog.")]
    sample = preference(pair("Sure?", "Yes!", "No way.", history, [image_file()]), qwen, spec)
    start = encode_prompt(template, history, "Sure?", 1, qwen, 3)
    for side, answer in ((sample.chosen, "Yes!"), (sample.rejected, "No way.")):
        turns = [*history, ("Sure?", answer)]
        same = example(record(turns, [image_file()]), qwen, spec)
        assert real(side) == real(same)
        assert real(side)[: len(start)] == start
        assert np.flatnonzero(side.loss_mask)[0] == len(start)
        assert qwen.decode(supervised(side)).strip() == answer
        assert side.images is None
    np.testing.assert_array_equal(sample.images, same.images)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_preference_side_longer_than_max_length_is_an_error(side, qwen):
    answers = {"chosen": "a", "rejected": "b", side: "word " * 100}
    with pytest.raises(ValueError, match=rf"tokens of {side}: expected <= max_length 80, got \d+"):
        preference(pair("q", **answers), qwen, SPEC)


@pytest.mark.parametrize("template", ["vicuna", "chatml", "plain"])
def test_prompt_is_a_prefix_of_the_training_sample(template, qwen, image_file):
    spec = dataclasses.replace(SPEC, template=template)
    sample = example(record([("<image>\nWhat?", "A dog.")], [image_file()]), qwen, spec)
    ids = encode_prompt(template, [], "<image>\nWhat?", 1, qwen, 3)
    assert ids == real(sample)[: len(ids)]
    assert ids.count(qwen.image_id) == 3
    assert np.flatnonzero(sample.loss_mask)[0] == len(ids)


def test_prompt_requires_one_placeholder_per_image(qwen):
    with pytest.raises(ValueError, match="number of <image>: expected 1, one per image, got 0"):
        encode_prompt("vicuna", [], "What?", 1, qwen, 3)
    with pytest.raises(ValueError, match="number of <image>: expected 1, one per image, got 2"):
        encode_prompt("vicuna", [("<image>", "a")], "<image>", 1, qwen, 3)
    with pytest.raises(
        ValueError, match="images of the prompt: expected none for a text-only model, got 1"
    ):
        encode_prompt("vicuna", [], "<image>", 1, qwen, 0)
