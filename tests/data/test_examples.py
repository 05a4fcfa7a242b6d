import numpy as np
import pytest

from moddistill.data.examples import count_tokens, encode_prompt, encode_sides
from moddistill.data.image_files import ImageFile
from moddistill.data.records import PreferencePair, Record

PATCHES = 3


def record(turns, images=0, system=None):
    files = tuple(ImageFile("r", f"{i}.png") for i in range(images))
    return Record("f", 1, "1", files, tuple(turns), system)


def pair(question, chosen, rejected, history=(), images=0):
    files = tuple(ImageFile("r", f"{i}.png") for i in range(images))
    return PreferencePair("f", 1, "1", files, tuple(history), question, chosen, rejected)


def encode(turns, tokenizer, template="vicuna", **fields):
    [side] = encode_sides(record(turns, **fields), template, tokenizer, PATCHES)
    return side


def supervised(side):
    return side.tokens[side.loss_mask].tolist()


def test_image_placeholder_is_repeated_per_patch(qwen):
    side = encode([("<image>\nWhat?", "A dog.")], qwen, images=1)
    text = "A chat between a curious user and an artificial intelligence assistant. The assistant "
    text += "gives helpful, detailed, and polite answers to the user's questions. USER: "
    answer = [*qwen.encode(" A dog."), qwen.pad_id]
    context = qwen.encode(text) + [qwen.image_id] * 3 + qwen.encode("\nWhat? ASSISTANT:")
    assert side.tokens.tolist() == context + answer
    assert side.loss_mask.tolist() == [False] * len(context) + [True] * len(answer)
    assert (side.tokens.dtype, side.loss_mask.dtype) == (np.int32, bool)


def test_images_are_where_their_placeholders_are(qwen):
    side = encode([("<image> or <image>?", "No.")], qwen, images=2)
    where = np.flatnonzero(side.tokens == qwen.image_id)
    assert (np.diff(where) == 1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("vicuna", "Be brief. USER: Hi ASSISTANT:"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"),
    ],
)
def test_system_prompt_replaces_that_of_the_template(template, start, qwen):
    turns = [("Hi", "Yes."), ("And?", "No.")]
    own, default = (encode(turns, qwen, template, system=x) for x in ("Be brief.", None))
    text = qwen.decode(own.tokens.tolist(), skip_special=False)
    assert text.startswith(start) and text.count("Be brief.") == 1
    assert supervised(own) == supervised(default)


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_preference_sides_differ_only_in_the_last_answer(template, qwen):
    history = [("<image>\nWhat?", "A dog.")]
    sides = encode_sides(pair("Sure?", "Yes!", "No way.", history, 1), template, qwen, PATCHES)
    start = encode_prompt(template, history, "Sure?", 1, qwen, PATCHES)
    for side, answer in zip(sides, ("Yes!", "No way."), strict=True):
        same = encode([*history, ("Sure?", answer)], qwen, template, images=1)
        np.testing.assert_array_equal(side.tokens, same.tokens)
        assert side.tokens[: len(start)].tolist() == start
        assert np.flatnonzero(side.loss_mask)[0] == len(start)
        assert qwen.decode(supervised(side)).strip() == answer


RECORDS = {
    "text": record([("What is it?", "A dog, I think.")]),
    "images": record([("<image> q", "a"), ("<image>\n<image> again", "b c d")], images=3),
    "forged": record([("q <|im_end|> <image>", "a <|endoftext|>")], images=1),
    "system": record([("q", "a")], system="Answer in one word."),
    "pair": pair("<image> Sure?", "Yes!", "No way, not at all.", [("q", "a")], images=1),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_counts_are_those_of_the_encoded_sample(template, name, qwen):
    each = RECORDS[name]
    counts = count_tokens(each, template, qwen, PATCHES)
    sides = encode_sides(each, template, qwen, PATCHES)
    assert counts.tokens == max(len(side.tokens) for side in sides)
    if name == "pair":
        assert counts.needed == counts.tokens
        return
    [side] = sides
    images = np.flatnonzero(side.tokens == qwen.image_id)
    first = int(np.flatnonzero(side.loss_mask)[0])
    assert counts.needed == max(first + 1, int(images[-1]) + 1 if len(images) else 0)


def test_record_that_a_template_cannot_render_has_no_counts(qwen):
    bad = record([("<image>", "a"), ("q", "b")], images=1)
    with pytest.raises(ValueError, match="turns of the plain template: expected exactly 1, got 2"):
        count_tokens(bad, "plain", qwen, PATCHES)
    good = record([("<image>", "a red cup")], images=1)
    assert count_tokens(good, "plain", qwen, PATCHES) == (3 + len(qwen.encode("a red cup")) + 1, 4)


@pytest.mark.parametrize("template", ["vicuna", "chatml", "plain"])
def test_prompt_is_a_prefix_of_the_training_sample(template, qwen):
    side = encode([("<image>\nWhat?", "A dog.")], qwen, template, images=1)
    ids = encode_prompt(template, [], "<image>\nWhat?", 1, qwen, PATCHES)
    assert ids == side.tokens[: len(ids)].tolist()
    assert ids.count(qwen.image_id) == PATCHES
    assert np.flatnonzero(side.loss_mask)[0] == len(ids)


def test_prompt_requires_one_placeholder_per_image(qwen):
    with pytest.raises(ValueError, match="number of <image>: expected 1, one per image, got 0"):
        encode_prompt("vicuna", [], "What?", 1, qwen, 3)
    with pytest.raises(ValueError, match="number of <image>: expected 1, one per image, got 2"):
        encode_prompt("vicuna", [("<image>", "a")], "<image>", 1, qwen, 3)
    with pytest.raises(
        ValueError, match="images of the prompt: expected none for a text-only model, got 1"
    ):
        encode_prompt("vicuna", [], "<image>", 1, qwen, 0)
