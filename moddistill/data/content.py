"""Fields of published records that have content, as opposed to metadata.

A record is never trained on in part: if its form does not use a field with content, the record is
rejected. The names are those of the published forms that were found; any other field is metadata.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moddistill.data.records import IMAGE
from moddistill.errors import invalid

IMAGE_FIELDS = ("image", "images", "img", "image_path")
# Of other publishers; no form uses them.
_OTHER_IMAGES = (
    "imgs", "picture", "pictures", "photo", "photos", "image_base64", "image_bytes", "img_base64",
    "img_bytes", "base64_image", "pixel_values", "image_data",
)  # fmt: skip
CONVERSATION_FIELDS = ("conversations", "messages", "texts")
PROMPT_FIELDS = ("conversations", "question", "prompt")
ANSWER_FIELDS = ("answer", "answers", "response", "output")
# Next to an image they say where it is from, like `image_path` in RLAIF-V.
_IMAGE_NAMES = (
    "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "img_path",
    "file_name",
)  # fmt: skip
OF_RECORD = frozenset(
    {
        *IMAGE_FIELDS, *_IMAGE_NAMES, *_OTHER_IMAGES, *CONVERSATION_FIELDS, *PROMPT_FIELDS,
        *ANSWER_FIELDS,
        "conversation", "query", "questions", "instruction", "input", "inputs", "outputs",
        "responses", "completion", "completions", "history", "context", "documents",
        "system_prompt", "chosen", "rejected", "rejected_conversations", "rejected_messages",
        "rejected_response", "rejected_images", "video", "videos", "audio", "audios", "objects",
        "tools", "tool_calls", "functions",
    }
)  # fmt: skip
# Part of the question in tables; next to a conversation, which repeats them, they are metadata.
OF_TABLE = OF_RECORD - {*ANSWER_FIELDS} | {"choices", "options", "hint", "passage"}
OF_MESSAGE = frozenset(
    {
        "image", "images", "video", "videos", "audio", "audios", "tools", "tool_calls",
        "function_call", "reasoning_content", "thinking",
    }
)  # fmt: skip
OF_PART = OF_MESSAGE | {"text", "path", "url", "base64", "image_url"}


def check_used(
    fields: Mapping[str, Any],
    used: Collection[str],
    content: Collection[str],
    *,
    texts: Collection[str] = (),
    has_image: bool = False,
) -> None:
    """Raises UserError for a field with content, or an image, that would not be used.

    Args:
      used: names of the fields that are used.
      content: names of the fields with content.
      texts: texts that are used. Of a field that repeats one, or a used field, nothing is lost.
      has_image: whether an image is used, which other fields may name.
    """
    for name, value in fields.items():
        if name in used or is_empty(value) or not (name.lower() in content or _is_image(value)):
            continue
        if has_image and name in _IMAGE_NAMES:
            continue
        without_images = (text.replace(IMAGE, "").strip() for text in texts)
        others = (fields[other] for other in used if other in fields)
        if value not in [*texts, *without_images, *others]:
            raise invalid(name, value, "none, since training would not use it")


def _is_image(value: Any) -> bool:
    """Returns whether a field is an image as `datasets` writes it, or a list of them."""
    if isinstance(value, str):  # most fields, and many records are read
        return False
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, Mapping) and "bytes" in item for item in items)


def is_empty(value: Any) -> bool:
    """Returns whether a field has no value: null, an empty one, or a struct of such (parquet)."""
    if value is None or isinstance(value, str | bytes | list):
        return not value
    if isinstance(value, Mapping):
        return all(each in (None, "", b"") for each in value.values())
    return False
