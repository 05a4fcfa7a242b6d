"""A conversation with several models, and what is refused before any of them answers."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from moddistill.errors import UserError
from moddistill.explorer.answers import transcript
from moddistill.explorer.conversation import ask, compile_ahead, routing_of
from moddistill.explorer.markup import percent
from moddistill.explorer.routing import _token_probs
from moddistill.inference.answer import Answer, Decoding
from moddistill.inference.decode import admit, step
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt

DECODING = Decoding(max_new_tokens=4, top_logprobs=2)
PROGRAMS = (admit, step, _token_probs)


@pytest.fixture(scope="module")
def models(explored):
    """Two models of one architecture, which have their programs in common."""
    one = explored("sparse")
    other = jax.tree.map(lambda x: 1.5 * x, one.params)
    return [one, dataclasses.replace(one, title="other", params=other)]


@pytest.fixture(scope="module")
def dialogue(models, image):
    """What two questions with an image each yield, one list for each question."""
    first = list(ask(models, (), "what is in it?", [image(0)], DECODING))
    return first, list(ask(models, first[-1], "and that?", [image(1)], DECODING))


def expected(model, *prompt):
    [found] = answer(model.model, model.params, model.tokenizer, [Prompt(*prompt)], DECODING)
    return found


@pytest.mark.slow
def test_programs_of_a_short_question_are_compiled_before_it(models, image):
    compile_ahead(models, DECODING)
    sizes = [program._cache_size() for program in PROGRAMS]
    [*_, turns] = ask(models, (), "what is in the image?", [image(0)], DECODING)
    routing_of(models[0], turns, 0)
    assert [program._cache_size() for program in PROGRAMS] == sizes and min(sizes) > 0


def test_each_model_goes_on_from_its_own_answers_and_sees_all_images(models, dialogue, image):
    first, both = (parts[-1] for parts in dialogue)
    question = "<image>\nwhat is in it?"
    for number, model in enumerate(models):
        before = expected(model, question, (image(0),))
        assert first[0].answers[number] == before
        prompt = ("<image>\nand that?", (image(0), image(1)), ((question, before.text),))
        assert both[1].answers[number] == expected(model, *prompt)


def test_answers_grow_one_model_after_the_other(dialogue):
    parts = [turns[-1].answers for turns in dialogue[0]]
    assert parts[0] == () and all(isinstance(x, Answer) for x in parts[-1])
    lengths = [len(answers) for answers in parts]
    assert lengths == sorted(lengths) and lengths[-1] == 2


def test_routing_is_that_of_the_last_prompt_and_its_answer(models, dialogue):
    turns = dialogue[1][-1]
    found, [sparse, _] = routing_of(models[0], turns, 0), turns[-1].answers
    assert found.token_ids == (*sparse.prompt_ids, *sparse.token_ids)
    patches = models[0].model.config.vision.patches
    first, second = np.flatnonzero(found.is_image).reshape(2, patches)
    # The router of a patch depends on its own image and those before it.
    black = dataclasses.replace(turns[-1], images=(Image.new("RGB", (28, 20)),))
    other = routing_of(models[0], (turns[0], black), 0)
    changed = np.abs(found.probs - other.probs)[-1].max(-1) > 1e-6
    assert not changed[first].any() and changed[second].all()


def test_a_dense_model_has_no_routing(explored, dialogue):
    assert routing_of(explored("dense"), dialogue[0][-1], 0) is None


def test_a_transparent_image_is_seen_as_in_generate(models, tmp_path):
    Image.new("RGBA", (20, 20), (200, 0, 0, 99)).save(tmp_path / "a.png")
    [*_, [turn]] = ask(models[:1], (), "what is in it?", [tmp_path / "a.png"], DECODING)
    assert turn.answers[0] == expected(
        models[0], "<image>\nwhat is in it?", (str(tmp_path / "a.png"),)
    )


def test_a_question_that_fills_the_context_is_an_error_before_any_answer(models, explored, image):
    length = len(expected(models[0], "<image>\nwhat is in it?", (image(0),)).prompt_ids)
    full = [models[1], explored("sparse", length)]
    message = f"fewer tokens than the context of the model, {length} .* got {length} tokens"
    with pytest.raises(UserError, match=message):
        next(ask(full, (), "what is in it?", [image(0)], DECODING))


@pytest.mark.parametrize(
    ("question", "content", "message"),
    [
        ("  ", None, "^prompt: expected a text or an image, got ''"),
        ("what?", b"no image", r"^a.png: expected a readable image \(JPEG, .* b'no image'"),
        ("<image> <image>", None, "number of <image>: expected 0, one per image, got 2"),
    ],
)
def test_what_cannot_be_asked_is_an_error_before_any_answer(
    models, tmp_path, question, content, message
):
    (tmp_path / "a.png").write_bytes(content or b"")
    with pytest.raises(UserError, match=message):
        next(ask(models, (), question, [tmp_path / "a.png"] * (content is not None), DECODING))


def test_a_transcript_shows_probabilities_and_alternatives(models, dialogue):
    [turn] = dialogue[0][-1]
    turn = dataclasses.replace(turn, question="<image>\nis {{it}} <b>?")
    shown = transcript((turn,), models)
    assert "<p>is &#123;&#123;it&#125;&#125; &lt;b&gt;?</p>" in shown
    tokens = [token for each in turn.answers for token in each.logprobs]
    assert shown.count('<span class="token') == len(tokens) == shown.count("&#10;or ")
    for token in tokens:
        assert f'style="--p:{np.exp(token.logprob):.3f}"' in shown
        [other] = (logprob for token_id, logprob in token.top if token_id != token.token_id)
        share = percent(float(np.exp(other))).replace(" ", "\u00a0")
        assert f' {share}">' in shown and f" {share}</td>" in shown


def test_an_answer_that_is_being_written_has_no_probabilities_yet(models, dialogue):
    [turn] = dialogue[0][-1]
    shown = transcript((dataclasses.replace(turn, answers=("so f",)),), models)
    assert 'so f<span class="writing"' in shown and '<span class="token' not in shown
