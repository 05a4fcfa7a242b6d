"""An answer while it is written: what ends it, and which of its text is settled."""

import itertools

import pytest

from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.inference.answer import Decoding, TokenLogprobs, Writing

END = 0
PIECES = {1: "a", 2: " cat", 3: ".", 4: "\n", 5: "Q", 6: "\ufffd", 7: "é", 8: " "}


class Pieces(Tokenizer):
    """A tokenizer whose tokens 6 and 7 are the two bytes of one character."""

    def __init__(self):
        """Without a file."""

    def decode(self, ids, skip_special=True):
        return "".join(PIECES[i] for i in ids).replace("\ufffdé", "é")


def write(ids, **settings):
    """Texts that are settled after each token, and the answer."""
    writing = Writing(3, [9, 9], Decoding(**({"max_new_tokens": 10} | settings)))
    settled = []
    for number in ids:
        assert not writing.ended
        writing.add(TokenLogprobs(number, -0.5), END, Pieces())
        settled.append(writing.settled(Pieces()))
    return settled, writing.answer(Pieces())


def test_the_end_token_is_no_part_of_an_answer():
    settled, answer = write([8, 1, 2, END])
    assert settled == ["", "a", "a cat", "a cat"]
    assert (answer.text, answer.token_ids, answer.ended) == ("a cat", [8, 1, 2], "end")
    assert [token.token_id for token in answer.logprobs] == [8, 1, 2, END]
    assert answer.prompt_ids == [9, 9]


def test_the_longest_answer_ends_by_its_length():
    _, answer = write([1, 2], max_new_tokens=2)
    assert (answer.text, answer.ended) == ("a cat", "length")


def test_a_stop_text_may_lie_across_tokens_and_is_held_back():
    settled, answer = write([1, 3, 4, 5], stop=("never", "\nQ"))
    assert settled == ["a", "a.", "a.", "a."]
    assert (answer.text, answer.ended, answer.token_ids) == ("a.", "stop", [1, 3, 4, 5])
    settled, answer = write([1, 3, 4, 3, END], stop=("\nQ",))
    assert settled == ["a", "a.", "a.", "a.\n.", "a.\n."]  # it was not the stop text


def test_the_first_of_several_stop_texts_counts():
    _, answer = write([1, 2, 3], stop=(".", "cat."))
    assert answer.text == "a"


def test_bytes_of_an_unfinished_character_are_held_back():
    settled, _ = write([1, 6, 7, END])
    assert settled == ["a", "a", "aé", "aé"]


def test_settled_text_only_grows():
    settled, answer = write([8, 1, 8, 4, 2, 6, 7, 8, END], stop=(" Q", "\n\n"))
    for before, after in itertools.pairwise(settled):
        assert after.startswith(before)
    assert settled[-1] == answer.text


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"stop": ("",)}, {"top_logprobs": -1}], ids=str
)
def test_settings_out_of_range_are_an_error(settings):
    with pytest.raises(UserError, match=f"^{next(iter(settings))}: expected"):
        Decoding(**({"max_new_tokens": 1} | settings))
