"""Pages from the files in `templates/`: a page, its style, and the parts that it consists of.

Values are escaped unless they are `Html`, that is, made of parts.
"""

import functools
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent / "templates"
_PART = re.compile(r'<template id="(\w+)">(.*?)</template>', re.DOTALL)


class Html(str):
    """A text that is HTML already."""


def part(name: str, /, **values: object) -> Html:
    """Returns a part of `fragments.html` with its names replaced.

    Raises:
      KeyError: there is no such part, or a name has no value.
    """
    return _fill(_parts()[name], values)


def page(title: str, sections: Html) -> str:
    """Returns a page that needs no other file."""
    return _fill(_read("page.html"), {"title": title, "style": _style(), "sections": sections})


def section(title: str, note: str | Html, content: Html) -> Html:
    """Returns a part of a page with a heading, which links may point to by `anchor(title)`."""
    note = part("note", text=note) if note else note
    return part("section", id=anchor(title), title=title, note=note, content=content)


def anchor(title: str) -> str:
    """Returns the id of a section."""
    return re.sub(r"\W+", "-", title).strip("-").lower()


def join(parts: Iterable[Html]) -> Html:
    """Returns parts one after the other."""
    return Html("".join(parts))


def _fill(text: str, values: dict[str, object]) -> Html:
    html = {key: x if isinstance(x, Html) else escape(str(x)) for key, x in values.items()}
    return Html(Template(text).substitute(html))


def _style() -> Html:
    return Html(_read("style.css"))


@functools.cache
def _parts() -> dict[str, str]:
    return dict(_PART.findall(_read("fragments.html")))


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
