"""Text as HTML, and the texts of single tokens."""

from collections.abc import Sequence
from html import escape

from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import printable

# What a character is encoded as in UTF-8 is at most this many bytes, and so tokens.
_LONGEST_CHARACTER = 4
_INCOMPLETE = "\ufffd"  # in place of bytes that are no character yet
# Of templates in which a component of the page may insert a text.
_TEMPLATE_CHARACTERS = str.maketrans({char: f"&#{ord(char)};" for char in "{}$`\\"})


def html_text(text: str) -> str:
    """Returns a text for the inside of an element or a quoted attribute."""
    return escape(printable(text)).translate(_TEMPLATE_CHARACTERS)


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each token, that of control tokens too.

    A character of several tokens is the text of its last one; the others are empty.
    """
    texts, pending = [], []
    for token_id in ids:
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special=False)
        if text.endswith(_INCOMPLETE) and len(pending) < _LONGEST_CHARACTER:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def visible(text: str) -> str:
    """Returns a token's text with signs for what cannot be seen by itself."""
    return text.replace("\n", "↵") if text else "…"


def percent(share: float) -> str:
    """Returns a share of 1 in percent.

    >>> percent(0.9312), percent(0.0004), percent(1e-9)
    ('93.1 %', '0.04 %', '< 0.01 %')
    """
    if 0 < share < 0.0001:
        return "< 0.01 %"
    return f"{share:.1%}".replace("%", " %") if share >= 0.001 else f"{100 * share:.2g} %"
