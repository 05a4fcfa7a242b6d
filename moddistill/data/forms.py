"""Published forms of records: fields of a JSON object or parquet row to a checked record.

A form is recognised by its fields; docs/data.md lists them. A record that breaks its form, or has
content that training would not use, is an error: it is never repaired or read in part.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from moddistill.config import ColumnsConfig
from moddistill.data.content import (
    CONVERSATION_FIELDS,
    IMAGE_FIELDS,
    OF_RECORD,
    OF_TABLE,
    PROMPT_FIELDS,
    check_used,
    is_empty,
)
from moddistill.data.image_files import EmbeddedImage, ImageFile
from moddistill.data.messages import (
    Message,
    parse_messages,
    parse_texts,
    show_roles,
    split_system,
    to_turns,
    with_placeholders,
)
from moddistill.data.records import ImageRef, PreferencePair, Record
from moddistill.errors import UserError, invalid

NO_COLUMNS = ColumnsConfig()
_MOST_NAMES = 20  # of fields, in an error
_MOST_IMAGES = 2**16 - 1  # of a record, since an index counts them in 16 bits


def parse_record(
    fields: Any,
    *,
    kind: str,
    file: str,
    line: int,
    image_root: str,
    columns: ColumnsConfig = NO_COLUMNS,
) -> Record | PreferencePair:
    """Returns the record in the fields of a JSON object or a parquet row.

    Args:
      kind: "conversation" or "preference".
      image_root: folder that image names are relative to.
      columns: names of the fields of a table of questions and answers.

    Raises:
      UserError: for fields of no known form, or of one that they break.
    """
    if not isinstance(fields, Mapping):
        raise invalid("record", fields, "a JSON object")
    parse = _pair if kind == "preference" else _conversation
    name = fields.get("id")
    place = {"file": file, "line": line, "id": str(name if isinstance(name, str | int) else line)}
    return parse(fields, image_root, columns, **place)


class _Content(NamedTuple):
    """The messages of a record, images inside of them, and the fields that were read."""

    messages: list[Message]
    images: list[Any]
    fields: tuple[str, ...]


def _conversation(
    fields: Mapping[str, Any], root: str, columns: ColumnsConfig, **place: Any
) -> Record:
    content = _table(fields, columns) if columns.question else _messages_of(fields)
    system, messages = split_system(content.messages, fields.get("system"))
    images, used = _images(fields, content.images, columns, root)
    check_used(
        fields,
        (*content.fields, *used),
        OF_TABLE if columns.question else OF_RECORD,
        texts=[message.text for message in content.messages],
        has_image=bool(images),
    )
    if content.fields != ("conversations",):
        messages = with_placeholders(messages, len(images))
    return Record(images=images, turns=to_turns(messages), system=system, **place)


def _messages_of(fields: Mapping[str, Any]) -> _Content:
    name = next((name for name in CONVERSATION_FIELDS if not is_empty(fields.get(name))), None)
    if name is None:
        names = list(itertools.islice(fields, _MOST_NAMES))
        raise invalid("fields of the record", names, "conversations, messages or texts")
    parse = parse_texts if name == "texts" else parse_messages
    return _Content(*parse(fields[name], name), (name,))


def _table(fields: Mapping[str, Any], columns: ColumnsConfig) -> _Content:
    """Returns the question and answer in the columns that the config names."""
    question, answer = (fields.get(name) for name in (columns.question, columns.answer))
    if isinstance(answer, list) and answer:
        answer = answer[0]
    for name, text in ((columns.question, question), (columns.answer, answer)):
        if not isinstance(text, str):
            raise invalid(name, text, "a text")
    messages = [Message("user", question), Message("assistant", answer)]
    return _Content(messages, [], (columns.question, columns.answer))


def _pair(
    fields: Mapping[str, Any], root: str, columns: ColumnsConfig, **place: Any
) -> PreferencePair:
    prompt = _prompt(fields)
    chosen, rejected = (_side(fields, name, prompt) for name in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1] or chosen.images != rejected.images:
        raise UserError(
            "rejected: expected the messages of chosen up to the last one, got other messages"
        )
    system, messages = split_system(chosen.messages[:-1], fields.get("system"))
    images, used = _images(fields, chosen.images, columns, root)
    used += prompt.fields + chosen.fields + rejected.fields
    texts = [message.text for message in chosen.messages]
    check_used(fields, used, OF_RECORD, texts=texts, has_image=bool(images))
    if prompt.fields != ("conversations",):
        messages = with_placeholders(messages, len(images))
    if not messages or messages[-1].role != "user":
        raise UserError(
            f"question: expected a user message before the answers, got {show_roles(messages)}"
        )
    return PreferencePair(
        images=images,
        history=to_turns(messages[:-1]) if messages[:-1] else (),
        question=messages[-1].text,
        chosen=chosen.messages[-1].text,
        rejected=rejected.messages[-1].text,
        system=system,
        **place,
    )


def _prompt(fields: Mapping[str, Any]) -> _Content:
    """Returns what comes before the answers: a text, messages, or nothing if they contain it."""
    name = next((name for name in PROMPT_FIELDS if not is_empty(fields.get(name))), None)
    if name is None:
        return _Content([], [], ())
    if isinstance(fields[name], str):
        return _Content([Message("user", fields[name])], [], (name,))
    return _Content(*parse_messages(fields[name], name), (name,))


def _side(fields: Mapping[str, Any], name: str, prompt: _Content) -> _Content:
    """Returns the prompt and an answer: a text, a message, or messages that may begin with it."""
    value = fields.get(name)
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    if not isinstance(value, Mapping | list):
        raise invalid(name, value, "a text or messages")
    messages, images = parse_messages([value] if isinstance(value, Mapping) else value, name)
    if messages[-1].role != "assistant":
        raise invalid(f"role of the last message of {name}", messages[-1].role, "assistant")
    if messages[: len(prompt.messages)] == prompt.messages:
        return _Content(messages, images, (name,))
    return _Content(prompt.messages + messages, prompt.images + images, (name,))


def _images(
    fields: Mapping[str, Any], inside: list[Any], columns: ColumnsConfig, root: str
) -> tuple[tuple[ImageRef, ...], tuple[str, ...]]:
    """Returns the images of a record, and the field that has them."""
    names = (columns.image,) if columns.image else IMAGE_FIELDS
    name = next((name for name in names if not is_empty(fields.get(name))), None)
    if inside:
        return tuple(_image(value, "image of a message", root) for value in inside), ()
    if name is None:
        return (), ()
    found = fields[name] if isinstance(fields[name], list) else [fields[name]]
    if len(found) > _MOST_IMAGES:
        raise invalid(f"number of {name}", len(found), f"at most {_MOST_IMAGES}")
    return tuple(_image(value, name, root) for value in found), (name,)


def _image(value: Any, origin: str, root: str) -> ImageRef:
    """Returns a reference to a named file, or to bytes with or without a name."""
    if isinstance(value, str) and value:
        return ImageFile(root, value)
    if isinstance(value, bytes) and value:
        return EmbeddedImage("", value)
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        name, data = value.get("path"), value.get("bytes")
        if isinstance(name, str | None) and isinstance(data, bytes | None):
            return EmbeddedImage(name or "", data) if data else ImageFile(root, name)
    raise invalid(origin, value, "a name, bytes, or an object with bytes or path")
