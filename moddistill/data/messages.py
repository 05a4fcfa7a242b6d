"""Messages of published conversations, and the turns that they form."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moddistill.data.content import OF_MESSAGE, OF_PART, check_used, is_empty
from moddistill.data.records import IMAGE, Turns
from moddistill.errors import UserError, invalid

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MOST_ROLES = 6  # in a message of an error


class Message(NamedTuple):
    """A message of a conversation; `role` is system, user or assistant."""

    role: str
    text: str


def parse_messages(value: Any, origin: str) -> tuple[list[Message], list[Any]]:
    """Reads messages of `from` and `value` (LLaVA), or of `role` and `content` (Hugging Face).

    Returns:
      The messages, and the images in them. A `content` is a text or a list of parts, of which each
      image becomes an `<image>` in the text.

    Raises:
      UserError: for anything else, named by `origin`.
    """
    if not isinstance(value, list) or not value:
        raise invalid(origin, value, "a list of messages")
    messages, images = [], []
    for number, item in enumerate(value):
        message, inside = _message(item, f"{origin}[{number}]")
        messages.append(message)
        images += inside
    return messages, images


def _message(item: Any, origin: str) -> tuple[Message, list[Any]]:
    role_name, text_name = ("from", "value")
    if isinstance(item, Mapping) and "role" in item:
        role_name, text_name = ("role", "content")
    if not isinstance(item, Mapping) or item.get(text_name) is None:
        raise invalid(origin, item, "an object with from and value, or role and content")
    role = item.get(role_name)
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{origin}.{role_name}", role, "human, gpt, user, assistant or system")
    check_used(item, (), OF_MESSAGE)
    _check_trained(item, _ROLES[role], origin)
    text, images = _text(item[text_name], f"{origin}.{text_name}")
    return Message(_ROLES[role], text), images


def _check_trained(item: Mapping[str, Any], role: str, origin: str) -> None:
    """Raises UserError for an answer that was published as one not to train on."""
    for name in ("weight", "loss"):
        if role == "assistant" and name in item and item[name] in (0, False):
            raise invalid(f"{origin}.{name}", item[name], "an answer that training may use")


def _text(value: Any, origin: str) -> tuple[str, list[Any]]:
    """Returns the text of a message, with `<image>` for each image part, and the images in it."""
    if isinstance(value, str):
        return value, []
    if not isinstance(value, list):
        raise invalid(origin, value, "a text or a list of parts")
    texts, images = [], []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            check_used(part, ("text",), OF_PART)
            texts.append(part["text"])
        elif kind == "image":
            check_used(part, ("image", "path"), OF_PART)
            texts.append(f"{IMAGE}\n")
            images += [part[name] for name in ("image", "path") if not is_empty(part.get(name))]
        else:
            raise invalid(f"{origin}[{number}]", part, "a part of type text or image")
    return "".join(texts), images


def parse_texts(value: Any, origin: str) -> tuple[list[Message], list[Any]]:
    """Reads a list of objects with `user` and `assistant` (FineVision, The Cauldron).

    Returns:
      The messages, and no images.

    Raises:
      UserError: for anything else, named by `origin`.
    """
    if not isinstance(value, list) or not value:
        raise invalid(origin, value, "a list of objects with user and assistant")
    messages = []
    for number, item in enumerate(value):
        for role in ("user", "assistant"):
            text = item.get(role) if isinstance(item, Mapping) else None
            if not isinstance(text, str):
                raise invalid(f"{origin}[{number}].{role}", text, "a text")
            messages.append(Message(role, text))
        check_used(item, (), OF_MESSAGE)
    return messages, []


def split_system(messages: list[Message], system: Any) -> tuple[str | None, list[Message]]:
    """Returns the system prompt, of a field or an opening message, and the other messages.

    Args:
      system: the value of the field.

    Raises:
      UserError: the field is no text, or another one than the message.
    """
    system = None if is_empty(system) else system
    if not isinstance(system, str | None):
        raise invalid("system", system, "a text")
    if messages and messages[0].role == "system":
        if system not in (None, messages[0].text):
            raise invalid("system", system, "the text of the opening system message, or none")
        system, messages = messages[0].text, messages[1:]
    return system, messages


def with_placeholders(messages: list[Message], count: int) -> list[Message]:
    """Returns messages with `<image>` before the first question if no question has one."""
    if not count or not messages or any(IMAGE in message.text for message in messages):
        return messages
    first = Message(messages[0].role, f"{IMAGE}\n" * count + messages[0].text)
    return [first, *messages[1:]]


def to_turns(messages: list[Message]) -> Turns:
    """Returns (question, answer) pairs of messages that alternate, the user's first.

    Raises:
      UserError: they do not, or the last one is not an answer.
    """
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            "roles: expected user and assistant in turn, a user first and an assistant last, got "
            f"{show_roles(messages)}"
        )
    texts = [message.text for message in messages]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def show_roles(messages: list[Message]) -> str:
    """Returns the first roles of messages, for an error."""
    shown = ", ".join(message.role for message in messages[:_MOST_ROLES])
    return f"{shown}, ..." if len(messages) > _MOST_ROLES else shown or "none"
