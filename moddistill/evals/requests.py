"""Requests of lmms-eval: messages, images and settings, as prompts and decoding have them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moddistill.data.records import IMAGE
from moddistill.errors import invalid
from moddistill.inference.answer import Decoding
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling

_LONGEST = 1024  # tokens of an answer whose task does not say
# Settings of requests for `transformers` that greedy answers, or images of one size, do not need.
_UNUSED = ("do_sample", "num_beams", "use_cache", "image_aspect_ratio", "image_sizes")
_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
}  # fmt: skip


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Returns the prompt of messages with contents of type `text` and `image`.

    An image is `<image>` and a line break, as in the chat template of an export.

    Raises:
      UserError: another content than texts and images, or roles that do not alternate.
    """
    texts: list[tuple[str, str]] = []
    images: list[Any] = []
    for message in messages:
        parts = []
        for content in message["content"]:
            if content["type"] == "text":
                parts.append(content["text"])
            elif content["type"] == "image":
                parts.append(f"{IMAGE}\n")
                images.append(content["url"])
            else:
                raise invalid("content of a message", content["type"], "text or image")
        texts.append((message["role"], "".join(parts)))
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        expected = "user and assistant in turns, the user first and last"
        raise invalid("roles of messages", roles, expected)
    said = [text for _, text in texts]
    history = tuple(zip(said[:-1:2], said[1::2], strict=True))
    return Prompt(said[-1], images_of(images), history, system)


def images_of(images: Sequence[Any]) -> tuple[Image.Image | str, ...]:
    """Returns images as prompts have them: RGB, or files.

    Raises:
      UserError: one is neither.
    """
    found: list[Image.Image | str] = []
    for image in images:
        if isinstance(image, Image.Image):
            found.append(image.convert("RGB"))
        elif isinstance(image, str):
            found.append(image)
        else:
            raise invalid("image of a question", type(image).__name__, "an image, not a video")
    return tuple(found)


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """Returns the settings of a request.

    Raises:
      UserError: a setting that no answer follows here.
    """
    settings = dict(settings)
    until = settings.pop("until", None) or ()
    sampled = bool(settings.get("temperature")) and settings.get("do_sample", True)
    if settings.get("num_beams") not in (None, 1):
        raise invalid("num_beams", settings["num_beams"], "1")
    found = {
        "max_new_tokens": settings.pop("max_new_tokens", None) or _LONGEST,
        "stop": (until,) if isinstance(until, str) else tuple(until),
    }
    sampling = {
        name: kind(settings[name]) for name, kind in _SAMPLING.items() if settings.get(name)
    }
    if not sampled:
        sampling = {name: x for name, x in sampling.items() if name == "repetition_penalty"}
    unknown = settings.keys() - _SAMPLING.keys() - set(_UNUSED)
    if unknown:
        expected = f"max_new_tokens, until, {', '.join(_SAMPLING)}"
        raise invalid("generation_kwargs of the task", sorted(unknown), expected)
    return Decoding(**found, sampling=Sampling(**sampling))
