"""Entries of a cache: what is written is read again, and takes the space that is promised."""

import numpy as np
import pytest

from moddistill.errors import UserError
from moddistill.teachers.entries import Entry, EntryFormat, TokenTargets, text_digest

LARGE = ((0, 151_643), (151_644, 152_064))


def random_entry(format, tokens, seed=0):
    rng = np.random.default_rng(seed)
    size = format.real_ids[-1][1]
    shape = (tokens, format.ids)
    ids = np.stack([rng.permutation(size)[: format.ids] for _ in range(tokens)]).astype(np.int32)
    logprobs = -rng.exponential(3.0, shape).astype(np.float32)
    log_rest = -rng.exponential(3.0, tokens).astype(np.float32)
    rest = log_rest if format.kind == "top_k" else None
    return Entry(TokenTargets(logprobs[:, 0], ids[:, -1], ids, logprobs, rest))


@pytest.mark.parametrize("kind", ["top_k", "samples"])
@pytest.mark.parametrize("ids, real_ids", [(64, LARGE), (5, ((0, 300),)), (3, ((0, 2**16 + 1),))])
def test_what_is_packed_is_unpacked(kind, ids, real_ids):
    format = EntryFormat(kind, ids, real_ids)
    entry = random_entry(format, tokens=7)
    data = format.pack(entry)
    found = format.unpack(data)
    assert len(data) == format.bytes_of(7)
    np.testing.assert_array_equal(found.targets.labels, entry.targets.labels)
    np.testing.assert_array_equal(found.targets.ids, entry.targets.ids)
    np.testing.assert_allclose(found.targets.logprobs, entry.targets.logprobs, rtol=2**-11)
    np.testing.assert_array_equal(found.targets.label_logprobs, entry.targets.label_logprobs)
    if kind == "top_k":
        np.testing.assert_array_equal(found.targets.log_rest, entry.targets.log_rest)


def test_a_token_of_a_vocabulary_of_18_bits_takes_4_25_k_and_10_25_bytes():
    format = EntryFormat("top_k", 64, LARGE)
    assert format.bytes_of(1000) - format.bytes_of(0) == 1000 * (4.25 * 64 + 10.25)
    assert EntryFormat("samples", 64, LARGE).bytes_of(100) < format.bytes_of(100)


def test_all_ids_are_exact_and_in_their_order():
    format = EntryFormat("top_k", 8, ((0, 5), (6, 9)))
    ids = np.array([[8, 0, 3, 1, 2, 4, 7, 6]], np.int32)
    logprobs = np.log(np.arange(1, 9, dtype=np.float32) / 36)[None]
    known = TokenTargets(np.float32([-1]), ids[:, 2], ids, logprobs, np.float32([-1e30]))
    found = format.unpack(format.pack(Entry(known))).targets
    np.testing.assert_array_equal(found.ids, [[0, 1, 2, 3, 4, 6, 7, 8]])
    np.testing.assert_array_equal(found.logprobs, logprobs[:, [1, 3, 4, 2, 5, 7, 6, 0]])


def test_a_pair_has_two_sums():
    format = EntryFormat("answers", 0, LARGE)
    entry = Entry(TokenTargets(np.float32([-3.5, -7.25])), digest=b"abcdefgh")
    found = format.unpack(format.pack(entry))
    np.testing.assert_array_equal(found.targets.label_logprobs, [-3.5, -7.25])
    assert found.targets.ids is None and found.digest == b"abcdefgh"


def test_a_record_without_targets_has_a_reason():
    format = EntryFormat("top_k", 4, LARGE)
    found = format.unpack(format.pack(Entry(None, "no image")))
    assert found.targets is None and found.reason == "no image"


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: b"MDR1" + x[4:], lambda x: x[:7]])
def test_other_bytes_are_refused(damage):
    format = EntryFormat("top_k", 4, LARGE)
    with pytest.raises(UserError, match="targets: expected"):
        format.unpack(damage(format.pack(random_entry(format, tokens=3))))


def test_digests_tell_texts_and_sides_apart():
    one, two = [b"a", b" b"], [b"c"]
    digests = {text_digest(one, two), text_digest(two, one), text_digest([b"a bc"])}
    assert len(digests) == 3
    assert text_digest(one) == text_digest([b" a b"])  # another template and vocabulary
