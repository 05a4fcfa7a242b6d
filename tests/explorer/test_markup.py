"""Text on the page: nothing of it is markup, and every token has a text."""

import pytest

from moddistill.explorer.markup import html_text, percent, token_texts, visible


def test_no_text_is_markup_nor_a_template():
    text = html_text("<b>\"'&{{x}} ${1} `a` \\ \x1b[31m")
    assert not set("<>\"'{}$`\\\x1b") & set(text)
    assert html_text("plain, text") == "plain, text"


def test_texts_of_tokens_are_together_that_of_the_row(tokenizer):
    text = "what is 形状 é?\n ok 🙂"
    ids = tokenizer.encode(text)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert "" in texts  # a part of a character, and the character is the text of its last token


def test_bytes_that_are_no_character_end_after_four_tokens(tokenizer):
    [half, *_] = tokenizer.encode("形")
    texts = token_texts([half] * 5 + tokenizer.encode("a"), tokenizer)
    assert texts[:3] == [""] * 3 and texts[3] and texts[-1].endswith("a")


def test_control_tokens_and_line_breaks_can_be_seen(tokenizer):
    [text] = token_texts([tokenizer.image_id], tokenizer)
    assert text == "<image>" and visible("\n") == "↵" and visible("") == "…"


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.0 %"), (0.0, "0 %"), (0.0004, "0.04 %"), (1e-9, "< 0.01 %")]
)
def test_percentages(share, text):
    assert percent(share) == text
