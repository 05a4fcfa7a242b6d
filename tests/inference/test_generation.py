"""Answers: their tokens, however rows are shared, ended and refilled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.convert.resolve import load
from moddistill.data.chat_template import render
from moddistill.errors import UserError
from moddistill.inference import batching, generation, table
from moddistill.inference.answer import Answer, Decoding, end_id
from moddistill.inference.decode import admit, step
from moddistill.inference.generation import answer, generate, stream
from moddistill.inference.prompts import Prompt, encode_prompt, load_images, prompt_batch
from moddistill.inference.sampling import Sampling
from moddistill.models.vlm import Vlm
from tests.calls import count_calls
from tests.inference.same_answers import assert_same_answers

NEW = 6
GREEDY = Decoding(max_new_tokens=NEW)
HOT = Decoding(max_new_tokens=NEW, sampling=Sampling(temperature=2.0), seed=5)
PENALISED = Decoding(max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1.5))


@pytest.fixture(scope="module", params=["dense", "sparse"])
def model(request, tiny_models, tokenizer):
    """The first arguments of `answer`."""
    return (*load(tiny_models[request.param], stacked=False), tokenizer)


@pytest.fixture(scope="module")
def dense(tiny_models, tokenizer):
    return (*load(tiny_models["dense"], stacked=False), tokenizer)


def reread(folder, prompt, tokenizer):
    """Greedy tokens of a model that reads the whole sequence so far in every step."""
    module, params = load(folder)
    ids = encode_prompt(prompt, module.config, tokenizer)
    images = [load_images(prompt, module.config.vision)]
    logits_of = jax.jit(lambda batch: Vlm.logits(module.apply({"params": params}, batch)))
    real = module.config.decoder.real_ids[-1][1]
    for _ in range(NEW):
        batch = prompt_batch([ids], images, tokenizer.pad_id)
        logits = logits_of(batch)[0, len(ids) - 1, :real]
        ids = [*ids, int(jnp.argmax(logits))]
    return ids[-NEW:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_tokens_are_those_without_a_cache(name, tiny_models, prompts, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "end_id", lambda *_: -1)
    loaded = load(tiny_models[name], stacked=False)
    for found, prompt in zip(answer(*loaded, tokenizer, prompts, GREEDY), prompts, strict=True):
        assert found.token_ids == reread(tiny_models[name], prompt, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_the_others(model, prompts, monkeypatch, decoding):
    """Rows are refilled as answers finish; prompts with the same images begin with them once.

    In one row, prompts are read one by one.
    """

    def answers(rows):
        monkeypatch.setattr(batching, "MAX_ROWS", rows)
        return answer(*model, prompts, decoding)

    # Some answers end early, so that rows become free one by one.
    [first, *_] = answers(1)
    monkeypatch.setattr(generation, "end_id", lambda *_: first.token_ids[2])
    one_by_one = answers(1)
    assert len({len(each.token_ids) for each in one_by_one}) > 1
    for rows in (2, 4, 256):
        assert_same_answers(answers(rows), one_by_one)


@pytest.mark.slow
def test_tokens_of_a_shared_beginning_are_penalised(dense, prompts, monkeypatch):
    together = answer(*dense, prompts, PENALISED)
    monkeypatch.setattr(batching, "MAX_ROWS", 1)
    one_by_one = answer(*dense, prompts, PENALISED)
    ids = [[each.token_ids for each in found] for found in (together, one_by_one)]
    assert ids[0] == ids[1]
    assert ids[0] != [each.token_ids for each in answer(*dense, prompts, GREEDY)]


def test_penalised_tokens_are_those_of_the_prompt_and_its_answer(dense, image, monkeypatch):
    """Neither those of another beginning, nor padding; four beginnings are read together."""
    found, beginnings = [], set()

    def admitted(*args, **static):
        rows, choice = admit(*args, **static)
        seen, shared = np.array(rows.seen), args[6]
        beginnings.add(len(shared.batch.tokens) if shared else 0)
        found.extend(sorted(np.flatnonzero(seen[row])) for row in args[4] if row < len(seen))
        return rows, choice

    monkeypatch.setattr(table, "admit", admitted)
    prompts = [
        Prompt(f"{before}<image>\n{question}", (image(0),))
        for before in ("", "one two three ", "four ", "five ")
        for question in map("{}?".format, range(8))
    ]
    prompts += [Prompt("six"), Prompt("seven and eight")]
    decoding = Decoding(max_new_tokens=1, sampling=PENALISED.sampling)
    answers = answer(*dense, prompts, decoding)
    expected = [
        sorted({*each.prompt_ids, *(token.token_id for token in each.logprobs)}) for each in answers
    ]
    assert sorted(found) == sorted(expected) and beginnings == {0, 4}


def test_all_free_rows_are_filled_before_a_step(dense, monkeypatch):
    """Three prompts are read by three programs, as their number is no power of four."""
    monkeypatch.setattr(generation, "end_id", lambda *_: -1)
    steps = count_calls(monkeypatch, table, "step")
    answer(*dense, [Prompt(f"{n}?") for n in range(3)], GREEDY)
    count = len(steps)
    assert count == NEW - 1  # the first tokens come from the prompts


@pytest.mark.slow
def test_layers_that_are_stacked_give_the_same_answers(model, prompts, tiny_models):
    name = "sparse" if model[0].config.decoder.moe else "dense"
    stacked = answer(*load(tiny_models[name]), model[2], prompts, GREEDY)
    ids = [found.token_ids for found in answer(*model, prompts, GREEDY)]
    assert ids == [found.token_ids for found in stacked]


def test_an_answer_of_a_model_with_capacity_does_not_depend_on_the_batch(
    tiny_models, prompts, tokenizer
):
    """Copies of one prompt would compete for the same slots."""
    model, params = load(tiny_models["sparse"])
    moe = dataclasses.replace(model.config.decoder.moe, dispatch="capacity", capacity_factor=0.1)
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    model = model.clone(config=dataclasses.replace(model.config, decoder=decoder))
    [single] = answer(model, params, tokenizer, prompts[:1], GREEDY)
    for row in answer(model, params, tokenizer, prompts[:1] * 8, GREEDY):
        assert row.token_ids == single.token_ids


def test_sampling_follows_its_seed(dense, prompts):
    draws = [
        [found.token_ids for found in answer(*dense, prompts, dataclasses.replace(HOT, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    [one, two] = answer(*dense, prompts[:1] * 2, HOT)
    assert one.token_ids != two.token_ids  # each prompt has its own randomness


def test_logprobs_are_those_of_the_model(dense, prompts, tiny_models):
    """Whatever the sampling; of each token, with the most probable ones in its place."""
    module, params = load(tiny_models["dense"])
    decoding = dataclasses.replace(HOT, top_logprobs=3)
    [found] = answer(*dense, prompts[:1], decoding)
    ids = found.prompt_ids + found.token_ids
    images = [load_images(prompts[0], module.config.vision)]
    batch = prompt_batch([ids], images, dense[2].pad_id)
    batch = jax.tree.map(jnp.asarray, batch)
    logits = Vlm.logits(module.apply({"params": params}, batch))[0]
    real = module.config.decoder.real_ids[-1][1]
    expected = jax.nn.log_softmax(logits[len(found.prompt_ids) - 1 : len(ids) - 1, :real])
    for token, row in zip(found.logprobs, np.asarray(expected), strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [number for number, _ in token.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in token.top], row[best], atol=1e-4)


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(dense, prompts, monkeypatch):
    [whole] = answer(*dense, prompts[:1], HOT)
    monkeypatch.setattr(generation, "end_id", lambda *_: whole.token_ids[2])
    [found] = answer(*dense, prompts[:1], HOT)
    assert (found.token_ids, found.ended) == (whole.token_ids[:2], "end")
    assert [token.token_id for token in found.logprobs] == whole.token_ids[:3]


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(dense, prompts):
    [whole] = answer(*dense, prompts[:1], HOT)
    stop = whole.text[3:5]
    [found] = answer(*dense, prompts[:1], dataclasses.replace(HOT, stop=("never", stop)))
    assert (found.text, found.ended) == (whole.text[: whole.text.index(stop)].strip(), "stop")


def test_streamed_parts_are_the_text_of_the_answer(dense, prompts):
    decoding = dataclasses.replace(HOT, max_new_tokens=40)
    *parts, last = stream(*dense, prompts[1], decoding)
    assert isinstance(last, Answer) and len(parts) > 5
    assert "".join(parts) == last.text
    assert answer(*dense, prompts[1:2], decoding) == [last]
    # What may be the beginning of a stop text is held back until it is known.
    stop = last.text[10:14]
    *parts, last = stream(*dense, prompts[1], dataclasses.replace(decoding, stop=(stop,)))
    assert "".join(parts) == last.text


def test_programs_are_compiled_once_for_each_bucket(dense, prompts):
    answer(*dense, prompts, GREEDY)
    sizes = admit._cache_size(), step._cache_size()
    answer(*dense, prompts[::-1], GREEDY)
    answer(*dense, prompts, GREEDY)
    assert (admit._cache_size(), step._cache_size()) == sizes


def test_no_prompts_have_no_answers(dense):
    assert answer(*dense, [], GREEDY) == []


def test_prompts_that_cannot_be_answered(dense, prompts, tmp_path):
    """The others are answered if errors are taken; else the first error ends it."""
    (tmp_path / "a.png").write_bytes(b"no image")
    bad = [
        Prompt("<image> what?", (str(tmp_path / "a.png"),)),
        Prompt("<image> what?"),
        Prompt(" "),
        Prompt("half a pair: \ud800"),
        Prompt("and then?", history=(("half a pair: \ud800", "yes"),)),
    ]
    errors = {}
    asked = [bad[0], prompts[0], *bad[1:]]
    found = dict(generate(*dense, asked, GREEDY, errors.__setitem__))
    assert list(found) == [1]
    assert found[1].token_ids == answer(*dense, prompts[:1], GREEDY)[0].token_ids
    assert {number: str(error)[:40] for number, error in errors.items()} == {
        0: f"{tmp_path / 'a.png'}: expected"[:40],
        2: "number of <image>: expected 0, one per i",
        3: "prompt: expected a text or an image, got",
        4: "text: expected valid Unicode, got 'utf-8",
        5: "text: expected valid Unicode, got 'utf-8",
    }
    for prompt in bad:
        with pytest.raises(UserError):
            answer(*dense, [prompt], GREEDY)


def test_images_are_padded_with_the_vision_encoders_mean(prompts, tiny_architecture):
    tower = tiny_architecture().vision
    black = dataclasses.replace(tower, mean=(0.0, 0.0, 0.0))
    np.testing.assert_array_equal(load_images(prompts[1], black)[0, 0], np.zeros((28, 3)))
    assert load_images(prompts[1], tower)[0, 0].min() > 90


def test_the_plain_template_ends_answers_with_a_line_break(tokenizer):
    """`plain` stops at a line break, which training must show as a token of its own."""
    end = render("plain", [("<image>", "a dog.")])[-1]
    assert tokenizer.encode(end.text) == [end_id("plain", tokenizer)]


def with_context(loaded, context):
    model, params, tokenizer = loaded
    return model.clone(config=dataclasses.replace(model.config, context=context)), params, tokenizer


def test_an_answer_ends_with_the_context_of_the_model(dense, prompts, monkeypatch):
    monkeypatch.setattr(generation, "end_id", lambda *_: -1)
    [whole] = answer(*dense, prompts[:1], GREEDY)
    limited = with_context(dense, len(whole.prompt_ids) + 2)
    [found] = answer(*limited, prompts[:1], GREEDY)
    assert (found.token_ids, found.ended) == (whole.token_ids[:2], "length")


@pytest.mark.slow
def test_a_prompt_that_fills_the_context_is_an_error_and_the_others_are_answered(dense, prompts):
    found = answer(*dense, prompts, GREEDY)
    longest = max(range(len(prompts)), key=lambda number: len(found[number].prompt_ids))
    context, errors = len(found[longest].prompt_ids), {}
    rest = dict(generate(*with_context(dense, context), prompts, GREEDY, errors.__setitem__))
    assert longest in errors and len(rest) + len(errors) == len(prompts)
    assert all(each.token_ids == found[number].token_ids for number, each in rest.items())
    message = rf"expected fewer tokens than the context of the model, {context} .* got {context} t"
    with pytest.raises(UserError, match=message):
        raise errors[longest]


@pytest.mark.slow
def test_the_rest_of_a_list_is_sampled_as_in_the_whole_of_it(dense, prompts):
    whole = answer(*dense, prompts, HOT)
    rest = dict(generate(*dense, prompts[2:], HOT, draws=range(2, len(prompts))))
    found = [rest[number].token_ids for number in range(len(rest))]
    assert found == [each.token_ids for each in whole[2:]]
    other = dict(generate(*dense, prompts[2:], HOT))
    assert found != [other[number].token_ids for number in range(len(other))]
