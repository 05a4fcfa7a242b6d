"""Targets of records whose teacher reads other tokens, on a cache of one record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig
from moddistill.data.examples import Side
from moddistill.data.records import Record
from moddistill.data.rows import Encoded, WithoutTargets
from moddistill.data.token_texts import TokenTexts
from moddistill.errors import UserError
from moddistill.losses.divergences import divergence_to
from moddistill.models.batch import LAST, WITHIN, CacheShape
from moddistill.models.logits import MASKED
from moddistill.teachers.alignment import id_map
from moddistill.teachers.cache import TeacherCache
from moddistill.teachers.cached import CachedTeacher
from moddistill.teachers.cached_rows import CachedRows
from moddistill.teachers.entries import Entry, TokenTargets, text_digest
from moddistill.teachers.targets import NO_ID, Targets

# Ids of the student: letters, two of them together, and control tokens; 9 ends an answer.
STUDENT = TokenTexts([b"a", b"b", b"c", b" ", b"ab", b" a", b"bc", None], {"<s>": 8, "</s>": 9}, 9)
# The same texts with the same ids; another end, and a control token that the student lacks.
SAME = TokenTexts(STUDENT.texts, {"<s>": 8, "</s>": 9, "<end>": 10, "<tool>": 11}, 10)
# Other texts, other ids.
OTHER = TokenTexts([b"b", b"a", b"abc", b" ", b"c", None, b"x"], {"<eos>": 7}, 7)


class OneRecord(TeacherCache):
    """A cache of one entry, without files."""

    shape = texts = None

    def __init__(self, texts, found, shape):
        self.texts, self.found, self.shape = texts, found, shape

    def entry(self, source, number):
        assert (source, number) == ("records", 5)
        return self.found


def sample(sides):
    """Record 5 of the first source; its content is that of the sides."""
    return Encoded(0, 5, 1, Record("records.json", 5, "5", (), (("c", "abc"),)), sides)


def read(texts, labels, answer, *, kind="top_k", seed=0, by_rank=False):
    """The targets of a prompt `c`, `<s>` and the tokens `answer`, of whose teacher's `labels`."""
    rng = np.random.default_rng(seed)
    texts_ids = np.int32([id for id, text in enumerate(texts.texts) if text is not None])
    ids = np.stack([rng.permutation(texts_ids)[:3] for _ in labels])
    logprobs = np.log(rng.dirichlet(np.ones(4), len(labels))).astype(np.float32)
    rest = logprobs[:, 3] if kind == "top_k" else None
    targets = TokenTargets(
        -rng.exponential(size=len(labels)).astype(np.float32),
        np.array(labels, np.int32),
        ids,
        logprobs[:, :3],
        rest,
    )
    cache = OneRecord(texts, Entry(targets), CacheShape(kind, 3))
    rows = CachedRows(cache, ("records",), id_map(texts, STUDENT), STUDENT, by_rank)
    tokens = np.array([2, 8, *answer], np.int32)
    mask = np.arange(len(tokens)) >= 2
    [row] = rows.read(sample([Side(tokens, mask)]))
    return row, targets, 1 + np.arange(len(answer))  # positions that predict the answer


def test_equal_tokens_have_their_targets_at_the_positions_before_them():
    row, targets, at = read(STUDENT, [4, 2, 9], [4, 2, 9])
    np.testing.assert_array_equal(np.flatnonzero(row.known), at)
    np.testing.assert_array_equal(row.ids[at], targets.ids)
    np.testing.assert_array_equal(row.logprobs[at], targets.logprobs)
    np.testing.assert_array_equal(row.log_rest[at], targets.log_rest)
    assert not row.chunk.any()


def test_ends_of_answers_are_exchanged():
    row, _, at = read(SAME, [4, 2, 10], [4, 2, 9])
    assert row.known[at].all() and not row.chunk.any()
    mapped = id_map(SAME, STUDENT).to_student
    assert (mapped[10], mapped[9], mapped[8]) == (9, mapped[11], 8)


def test_a_space_before_the_answer_is_of_the_template():
    """The teacher's `a` is the student's ` a`: its likelihood is known, and the rest as it is."""
    row, targets, at = read(SAME, [0, 6, 10], [5, 6, 9])
    np.testing.assert_array_equal(row.known[at], [False, True, True])
    np.testing.assert_array_equal(row.chunk[at], [LAST, 0, 0])
    assert row.chunk_logprobs[at[0]] == targets.label_logprobs[0]
    np.testing.assert_array_equal(row.logprobs[at[1:]], targets.logprobs[1:])


def test_chunks_of_another_vocabulary_end_at_the_same_bytes():
    """`ab` `c` `a` of the student, `abc` and `a` of the teacher; both begin with one class."""
    row, targets, at = read(OTHER, [2, 1, 7], [4, 2, 0, 9])
    np.testing.assert_array_equal(row.chunk[at], [WITHIN, LAST, 0, 0])
    np.testing.assert_array_equal(row.known[at], [True, False, True, True])
    np.testing.assert_array_equal(row.chunk_logprobs[at], [0, targets.label_logprobs[0], 0, 0])


def test_a_chunk_has_the_likelihood_of_all_its_tokens_of_the_teacher():
    """`ab` of the student, `a` and `b` of the teacher."""
    row, targets, at = read(OTHER, [1, 0, 7], [4, 9])
    np.testing.assert_array_equal(row.chunk[at], [LAST, 0])
    assert row.chunk_logprobs[at[0]] == targets.label_logprobs[:2].sum()
    assert row.known[at].all()


def test_ids_of_one_class_have_their_probability_together():
    """Of the teacher `a` and `abc`, of the student `a` and `ab`; `x` is in no class of it."""
    row, targets, at = read(OTHER, [1, 0, 7], [0, 1, 9], seed=9)  # has both of a class
    for number, position in enumerate(at):
        p = dict(zip(targets.ids[number].tolist(), np.exp(targets.logprobs[number]), strict=True))
        found = dict(zip(row.ids[position].tolist(), np.exp(row.logprobs[position]), strict=True))
        together = p.get(1, 0) + p.get(2, 0)
        assert found.get(0, 0) == pytest.approx(together) and found.get(NO_ID, 0) == 0
        rest = np.exp(targets.log_rest[number]) + p.get(6, 0)
        assert np.exp(row.log_rest[position]) == pytest.approx(rest)


def test_a_chunk_after_a_space_that_one_side_skips_has_a_likelihood_only():
    """` a` of the student, `a` of the teacher at the beginning of an answer."""
    row, _, at = read(OTHER, [1, 0, 7], [5, 1, 9])
    assert row.known[at].tolist() == [False, True, True]
    assert row.chunk[at].tolist() == [LAST, 0, 0]


def test_by_rank_each_chunk_has_the_probabilities_of_its_first_token():
    """`ab c a` and the end here, `abc a` and the end there: three texts that both have read."""
    row, targets, at = read(OTHER, [2, 1, 7], [4, 2, 0, 9], by_rank=True)
    assert row.known[at].tolist() == [True, False, True, True] and not row.chunk.any()
    np.testing.assert_array_equal(row.logprobs[at[[0, 2, 3]]], targets.logprobs)
    np.testing.assert_array_equal(row.log_rest[at[[0, 2, 3]]], targets.log_rest)


def test_texts_that_no_token_of_the_student_has_are_in_the_bucket():
    row, targets, at = read(OTHER, [1, 0, 7], [0, 1, 9], seed=9)  # has both of a class
    assert row.known[at].all()
    absent = targets.ids == 6
    assert absent.any()
    # `a` and `abc` of the teacher are one class, which the first of them has.
    of_class = np.isin(targets.ids, [1, 2])
    second = of_class & (np.cumsum(of_class, axis=1) == 2)
    assert second.any()
    np.testing.assert_array_equal(row.logprobs[at] == MASKED, absent | second)
    np.testing.assert_allclose(
        np.exp(row.logprobs[at]).sum(1) + np.exp(row.log_rest[at]), 1, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["top_k", "samples"])
def test_control_tokens_that_the_student_lacks_have_no_part(kind):
    logits = jnp.linspace(-1, 1, 10)[None]
    log_q = np.asarray(jax.nn.log_softmax(logits))[0]
    p = np.array([0.4, 0.2, 0.2])
    entry = Entry(
        TokenTargets(
            np.float32([-1]),
            np.int32([4]),
            np.array([[3, 11, 1]], np.int32),
            np.log(p)[None].astype(np.float32),
            np.log(np.float32([0.2])) if kind == "top_k" else None,
        )
    )
    cache = OneRecord(SAME, entry, CacheShape(kind, 3))
    rows = CachedRows(cache, ("records",), id_map(SAME, STUDENT), STUDENT)
    [row] = rows.read(sample([Side(np.int32([2, 4]), np.array([False, True]))]))
    targets = Targets(jax.tree.map(lambda x: jnp.asarray(x[:1]), row))
    predictions = CachedTeacher(kind, ((0, 10),)).predictions(targets, ((0, 10),))

    def loss(logits):
        return divergence_to(predictions, logits, DistillationConfig())[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    if kind == "samples":
        expected = np.mean([np.log(0.4) - log_q[3], np.log(0.2) - log_q[1]])
    else:  # renormalised over the ids that both have
        rest = 1 - np.exp(log_q[3]) - np.exp(log_q[1])
        shared, q = np.array([0.4, 0.2, 0.2]) / 0.8, [*np.exp(log_q[[3, 1]]), rest]
        expected = np.sum(shared * np.log(shared / q))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_another_answer_has_no_targets():
    with pytest.raises(WithoutTargets, match="answer: expected 'abc' as the student reads it, got"):
        read(SAME, [0, 1, 1, 10], [4, 2, 9])


def test_a_truncated_answer_has_the_targets_of_what_both_have():
    row, _, at = read(SAME, [4, 2, 0, 1, 10], [4, 2, 0])
    assert row.known[at].all()
    row, _, at = read(SAME, [4, 2], [4, 2, 0, 1, 9])
    np.testing.assert_array_equal(row.known[at], [True, True, False, False, False])


def test_a_pair_is_compared_by_the_text_of_its_answers():
    sums = TokenTargets(np.float32([-1.5, -2.5]))
    texts = [[b"a", b"b", b"\xff"], [b"bc", b"\xff"]]
    sides = [
        Side(np.int32(x), np.array([False, *[True] * (len(x) - 1)])) for x in ([2, 4, 9], [2, 6, 9])
    ]

    def rows(digest):
        cache = OneRecord(OTHER, Entry(sums, digest=digest), CacheShape("answers", 0))
        return CachedRows(cache, ("records",), id_map(OTHER, STUDENT), STUDENT)

    found = rows(text_digest(*texts)).read(sample(sides))
    assert [row.label_logprobs.tolist() for row in found] == [[-1.5, 0, 0], [-2.5, 0, 0]]
    with pytest.raises(UserError, match="expected the log-likelihoods of these answers") as error:
        rows(text_digest(*reversed(texts))).read(sample(sides))
    assert not isinstance(error.value, WithoutTargets)
