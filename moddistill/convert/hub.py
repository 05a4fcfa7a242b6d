"""Folders of the Hugging Face hub, by name, and what their config says."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError
from moddistill.models.limits import check_numbers

_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "*.jinja")


def local_folder(name: str) -> Path:
    """`name` itself if it is a folder, otherwise what the hub has under it, fetched once.

    Raises:
      UserError: neither a folder nor a name that can be fetched from here.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{name!r} is no folder; accepted: a folder, or a hub name ORGANISATION/MODEL"
        )
    # Half a second to import, and folders do not need it.
    import huggingface_hub  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    # What its transport raises, behind a proxy that refuses for one, changes with its releases.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"{name!r} is no folder here, and the hub cannot be asked for it ({reason}); accepted: "
            "a folder, or a hub name where there is a network"
        ) from None


def sub_config(fields: Mapping[str, Any], name: str, origin: str) -> dict[str, Any]:
    """An object inside a config, empty if it is absent; UserError if it is something else."""
    part = fields.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise UserError(f"{origin}: {name} is {part!r:.80}; accepted: an object")
    return part


def check_not_quantized(fields: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for a config of quantised weights, its own or of a part."""
    for name, part in (("", fields), *_parts(fields)):
        quantization = part.get("quantization_config")
        if quantization is not None:
            prefix = name and f"{name}."
            method = quantization
            if isinstance(quantization, dict):
                method = quantization.get("quant_method", quantization)
            raise UserError(
                f"{origin}: {prefix}quantization_config is {method!r:.80}; accepted: weights that "
                "are not quantised, such as the bfloat16 release"
            )


def _parts(fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = ("text_config", "vision_config")
    return [(name, fields[name]) for name in names if isinstance(fields.get(name), dict)]


def with_defaults(
    fields: Mapping[str, Any],
    read: Mapping[str, Mapping[str, int | float | None]],
    origin: str,
    needed: Sequence[str] = (),
) -> dict[str, Any]:
    """A config with the defaults that `transformers` has for what it leaves out.

    Args:
      read: for each model type the fields that `transformers` gets to see, as it builds lists as
        long as some of the others say; and the largest value of those that are numbers.
      needed: fields; a config that states all of them is given back as it is.

    Raises:
      UserError: for numbers out of range, and fields that `transformers` refuses.
    """
    if needed and all(name in fields for name in needed):
        return dict(fields)
    # Seconds to import, and most language models state everything.
    from transformers import AutoConfig  # noqa: PLC0415

    kind = fields["model_type"]
    passed = _read_fields(fields, read[kind], origin, "")
    for name, part in _parts(passed):
        of_part = _read_fields(part, read[part["model_type"]], origin, f"{name}.")
        passed[name] = {"model_type": part["model_type"]} | of_part
    try:
        return AutoConfig.for_model(kind, **passed).to_dict()
    # Its checks of fields raise errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{origin}: a config of type {kind!r} is refused by transformers: {reason:.200}"
        ) from None


def _read_fields(
    fields: Mapping[str, Any], read: Mapping[str, int | float | None], origin: str, prefix: str
) -> dict[str, Any]:
    found = {name: fields[name] for name in read if name in fields}
    numbers = [name for name, value in found.items() if read[name] and value is not None]
    limits = {name: read[name] for name in numbers}
    check_numbers(found, limits, origin, lambda name: prefix + name)
    return found
