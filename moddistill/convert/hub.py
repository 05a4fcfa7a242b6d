"""Hugging Face folders and hub names, and their configs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError, invalid
from moddistill.models.limits import check_numbers

_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "*.jinja")


def local_folder(name: str) -> Path:
    """Returns a folder as it is, or downloads a hub name into the cache of `huggingface_hub`.

    Raises:
      UserError: `name` is neither a folder nor a hub name that can be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise invalid("model", name, "an existing folder or a hub name ORGANISATION/MODEL")
    # Takes half a second to import, and folders do not need it.
    import huggingface_hub  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    # The exceptions of its transport depend on its release.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            "model: expected an existing folder or a hub name that can be downloaded, got "
            f"{name!r} ({reason})"
        ) from None


def sub_config(fields: Mapping[str, Any], name: str, origin: str) -> dict[str, Any]:
    """Returns an object inside a config; empty if absent, UserError if it is no object."""
    part = fields.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise invalid(f"{origin}: {name}", part, "an object")
    return part


def check_not_quantized(fields: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for a config, or a part of one, of quantized weights."""
    for name, part in (("", fields), *_parts(fields)):
        quantization = part.get("quantization_config")
        if quantization is not None:
            prefix = name and f"{name}."
            method = quantization
            if isinstance(quantization, dict):
                method = quantization.get("quant_method", quantization)
            field = f"{origin}: {prefix}quantization_config"
            raise invalid(field, method, "weights that are not quantized, as the bfloat16 release")


def _parts(fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = ("text_config", "vision_config")
    return [(name, fields[name]) for name in names if isinstance(fields.get(name), dict)]


def with_defaults(
    fields: Mapping[str, Any],
    read: Mapping[str, Mapping[str, int | float | None]],
    origin: str,
    needed: Sequence[str] = (),
) -> dict[str, Any]:
    """Adds the defaults of `transformers` to a config.

    Args:
      read: for each model type, the fields that are passed to `transformers`, with the largest
        value of numbers. Other fields are dropped: it allocates lists as long as some of them say.
      needed: a config with all of these fields is returned unchanged.

    Raises:
      UserError: numbers out of range, or fields that `transformers` rejects.
    """
    if needed and all(name in fields for name in needed):
        return dict(fields)
    # Takes seconds to import, and configs of most language models are complete.
    from transformers import AutoConfig  # noqa: PLC0415

    kind = fields["model_type"]
    passed = _read_fields(fields, read[kind], origin, "")
    for name, part in _parts(passed):
        of_part = _read_fields(part, read[part["model_type"]], origin, f"{name}.")
        passed[name] = {"model_type": part["model_type"]} | of_part
    try:
        return AutoConfig.for_model(kind, **passed).to_dict()
    # Its validation raises many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{origin}: expected a config of type {kind!r} that transformers accepts, got its "
            f"error: {reason:.200}"
        ) from None


def _read_fields(
    fields: Mapping[str, Any], read: Mapping[str, int | float | None], origin: str, prefix: str
) -> dict[str, Any]:
    known = {name: fields[name] for name in read if name in fields}
    numbers = [name for name, value in known.items() if read[name] and value is not None]
    limits = {name: read[name] for name in numbers}
    check_numbers(known, limits, origin, lambda name: prefix + name)
    return known
