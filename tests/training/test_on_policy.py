"""Answers of the student in training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moddistill.config import ExpertConfig, MeshConfig, OnPolicyConfig
from moddistill.convert.resolve import load
from moddistill.distributed import sharding
from moddistill.distributed.sharding import make_mesh, put_batch
from moddistill.inference import generation
from moddistill.inference.answer import Decoding
from moddistill.inference.prompts import Prompt, encode_prompt, load_images, prompt_batch
from moddistill.models.batch import Batch
from moddistill.models.vlm import Vlm
from moddistill.params import flatten
from moddistill.planning.hlo_collectives import collectives
from moddistill.planning.planner import abstract_batch
from moddistill.training import loading, loop
from moddistill.training.metrics import read_metrics
from moddistill.training.on_policy import Answers, answer_starts, make_answer, with_answers
from moddistill.training.program import make_program, with_shardings

NEW = 6
ONE, ALL = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, expert=2)
NO_END = -1
FIELDS = ("tokens", "positions", "segments", "loss_mask")


@pytest.fixture(scope="module")
def sparse(tiny_architecture, init):
    """A student whose experts drop tokens in training, and its parameters."""
    experts = ExpertConfig(dispatch="capacity", capacity_factor=0.1)
    architecture = tiny_architecture("tiny", experts)
    return Vlm(architecture), init(architecture)


@pytest.fixture(scope="module")
def program(tiny_config, sparse):
    """`program(mesh, batch_size, end, ids, ...)`: `answer` of a sparse student, on a mesh."""

    def make(mesh, batch_size, end=NO_END, ids=None, seed=0, accumulate=1, **on_policy):
        config = tiny_config(
            "d2s",
            batch_size=batch_size,
            grad_accum_steps=accumulate,
            seed=seed,
            on_policy=OnPolicyConfig(tokens=NEW, **on_policy),
        )
        mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == ONE else 8])
        model, params = sparse
        ids = ids or model.config.decoder.real_ids
        answer = make_answer(config, model, ids, end, mesh)

        def run(batch, step):
            with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
                placed = put_batch(mesh, batch)
                return jax.device_get(answer(flatten(params), {}, placed, jnp.int32(step)))

        run.answer, run.mesh = answer, mesh
        return run

    return make


def training_rows(model, prompts, tokenizer):
    """Rows of prompts, each with an answer of three tokens; the longest fills its row."""
    ids = [encode_prompt(prompt, model.config, tokenizer) for prompt in prompts]
    length = max(map(len, ids)) + 3
    images = [load_images(prompt, model.config.vision) for prompt in prompts]
    rows = [[*prompt, 5, 6, 7] for prompt in ids]
    batch = prompt_batch(rows, images, tokenizer.pad_id)
    place = np.arange(length)[None]
    starts = np.array(list(map(len, ids)))[:, None]
    mask = (place >= starts) & (place < starts + 3)
    cut = {name: getattr(batch, name)[:, :length] for name in ("tokens", "positions", "segments")}
    return batch._replace(**cut, loss_mask=mask), ids


@pytest.mark.slow
def test_answers_are_those_of_the_decoder(sparse, program, tokenizer, image, monkeypatch):
    """Nearly greedy; some end early, and one has room for three tokens only."""
    model, params = sparse
    questions = ["what is it?", "is it red, green or blue?", "say what colour that is, in a word"]
    prompts = [
        Prompt("<image>\n" * count + question, (image(0), image(1))[:count])
        for question in questions
        for count in range(3)
    ][:8]
    batch, ids = training_rows(model, prompts, tokenizer)
    decode = functools.partial(generation.answer, model, params, tokenizer, prompts)
    monkeypatch.setattr(generation, "end_id", lambda *_: NO_END)
    end = decode(Decoding(max_new_tokens=NEW))[0].token_ids[2]
    monkeypatch.setattr(generation, "end_id", lambda *_: end)
    expected = decode(Decoding(max_new_tokens=NEW))
    run = program(ONE, 8, end, accumulate=2, share=1.0, temperature=1e-4)
    found, metrics = run(batch, 0)
    assert found.on_policy.all()
    lengths, ended = [], []
    for row, (prompt, answer) in enumerate(zip(ids, expected, strict=True)):
        new = answer.token_ids + [end] * (answer.ended == "end")
        new = new[: batch.tokens.shape[1] - len(prompt)]
        lengths.append(len(new))
        ended.append(new[-1] == end)
        total = len(prompt) + len(new)
        assert found.tokens[row, :total].tolist() == prompt + new
        assert found.positions[row, :total].tolist() == list(range(total))
        assert found.segments[row].tolist() == [1] * total + [0] * (len(found.tokens[0]) - total)
        assert np.flatnonzero(found.loss_mask[row]).tolist() == list(range(len(prompt), total))
    assert {3, NEW} <= set(lengths) and 0 < sum(ended) < 8
    assert metrics == {"answer_tokens": (sum(lengths), 8), "answer_ended": (sum(ended), 8)}
    np.testing.assert_array_equal(found.images, batch.images)


@pytest.mark.slow
def test_the_student_answers_the_same_rows_alike_on_every_mesh(program, sparse, random_batch):
    """Every second row, of which the fifth has no answer; whatever the number of micro-batches."""
    batch = random_batch(sparse[0].config, rows=32, length=24)
    for field in FIELDS:
        getattr(batch, field).setflags(write=True)
    batch = batch._replace(segments=batch.segments.copy(), loss_mask=batch.loss_mask.copy())
    batch.segments[4], batch.loss_mask[4] = 0, False
    sampled = {"share": 0.5, "ids": ((0, 90),)}
    sharded = program(ALL, 32, accumulate=2, **sampled)
    found, metrics = sharded(batch, 3)
    mine = [row for row in range(0, 32, 2) if row != 4]
    assert np.flatnonzero(found.on_policy).tolist() == mine
    for field in FIELDS:
        rest = np.setdiff1d(np.arange(32), mine)
        np.testing.assert_array_equal(getattr(found, field)[rest], getattr(batch, field)[rest])
    new = found.tokens[found.loss_mask & found.on_policy[:, None]]
    assert new.max() < 90 and len(set(new.tolist())) > 30
    assert metrics["answer_tokens"] == (len(new), 15)
    chex.assert_trees_all_equal(sharded(batch, 3), (found, metrics))
    chex.assert_trees_all_equal(program(ONE, 32, **sampled)(batch, 3)[0], found)
    assert (sharded(batch, 4)[0].tokens != found.tokens).any()
    assert (program(ONE, 32, seed=1, **sampled)(batch, 3)[0].tokens != found.tokens).any()


def test_rows_stay_on_their_devices(tiny_config, tiny_architecture):
    """Only the newest token of each row, and whether all have ended, is sent."""
    config = tiny_config("d2d", batch_size=32, on_policy={"share": 0.5, "tokens": NEW})
    mesh, model = make_mesh(MeshConfig(data=8)), Vlm(tiny_architecture())
    program = make_program(config, model.config, model.config, mesh)
    answer = make_answer(config, model, model.config.decoder.real_ids, NO_END, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        state = with_shardings(program.abstract_state, program.state_shardings)
        batch = abstract_batch(config, model.config, mesh)
        lowered = answer.lower(state.params, state.frozen, batch, state.step)
        sent = collectives(lowered.compile().as_text())
    # 16 ids of 4 bytes, after the prompts and in the loop.
    assert sent.keys() == {"all-gather", "all-reduce"}
    assert sent["all-gather"]["bytes"] == 2 * 16 * 4
    assert sent["all-reduce"]["bytes"] <= 16


A, B = (7, 8, 9), (4, 5)


def rows(*parts):
    """Rows of 8 positions from (tokens, supervised) pieces."""
    tokens, mask = np.zeros((len(parts), 8), np.int32), np.zeros((len(parts), 8), bool)
    segments = np.zeros((len(parts), 8), np.int32)
    for row, pieces in enumerate(parts):
        ids = [token for piece, _ in pieces for token in piece]
        flags = [supervised for piece, supervised in pieces for _ in piece]
        tokens[row, : len(ids)], mask[row, : len(ids)], segments[row, : len(ids)] = ids, flags, 1
    positions = np.where(segments, np.arange(8), 0).astype(np.int32)
    return Batch(*map(jnp.asarray, (tokens, positions, segments, mask)))


CONVERSATION = rows(
    [(A, False), (B, True)],
    [(A, False), (B, True), (A[:1], False), (B, True)],  # two answers
    [(A, False), (B, True), (A, False)],  # truncated in a question
    [],  # could not be read
    [(B, True)],  # no prompt
    [(A, False), (A[:2], False), (B, True), (A[:1], True)],  # to the end of the row
)


def test_the_last_answer_is_found():
    assert answer_starts(CONVERSATION).tolist() == [3, 6, 3, 0, 0, 5]


def test_answers_take_the_place_of_the_last_ones_and_only_they_are_supervised():
    new = jnp.tile(jnp.array([[1, 2, 3]]), (6, 1))
    counts = jnp.array([3, 2, 1, 0, 0, 3])
    found = with_answers(CONVERSATION, Answers(new, counts, counts > 0))
    expected = rows(
        [(A, False), ((1, 2, 3), True)],
        [(A, False), (B, False), (A[:1], False), ((1, 2), True)],
        [(A, False), ((1,), True)],
        [],
        [(B, True)],
        [(A, False), (A[:2], False), ((1, 2, 3), True)],
    )
    chex.assert_trees_all_equal(found._replace(on_policy=None), expected)
    assert found.on_policy.tolist() == [True, True, True, False, False, True]


@pytest.mark.slow
def test_interrupted_run_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    """Stopped in its third step, after a checkpoint of the second."""
    config = tiny_config(
        "d2d",
        batch_size=16,
        steps=3,
        remat="none",
        data={"packing": False},
        on_policy={"share": 0.5, "tokens": 4},
    )
    programs, make = [], loading.make_answer
    monkeypatch.setattr(
        loading, "make_answer", lambda *args: programs.append(make(*args)) or programs[-1]
    )
    loop.train(config, tmp_path / "whole")
    put, calls = sharding.put_batch, []

    def put_two(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sharding, "put_batch", put_two)
        loop.train(config, tmp_path / "parts")
    loop.train(config, tmp_path / "parts")
    assert [program._cache_size() for program in programs] == [1, 1, 1]
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    names = ("step", "loss", "kd", "answer_tokens", "answer_ended")
    assert [[row[x] for x in names] for row in parts] == [[row[x] for x in names] for row in whole]
    assert all(1 <= row["answer_tokens"] <= 4 for row in whole)
    ours, theirs = (flatten(load(tmp_path / name / "model")[1]) for name in ("parts", "whole"))
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
