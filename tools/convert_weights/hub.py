"""Folders of the Hugging Face hub, by name, and what their config says."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "*.jinja")


def local_folder(name: str) -> Path:
    """`name` itself if it is a folder, otherwise what the hub has under it, fetched once.

    Raises:
      ValueError: neither a folder nor a name that can be fetched from here.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"{name!r} is no folder; accepted: a folder, or a hub name ORGANISATION/MODEL"
        )
    # Half a second to import, and folders do not need it.
    import huggingface_hub  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    # What its transport raises, behind a proxy that refuses for one, changes with its releases.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder here, and the hub cannot be asked for it ({reason}); accepted: "
            "a folder, or a hub name where there is a network"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if the file is missing or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{str(file.parent)!r} has no {file.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def part_of(fields: Mapping[str, Any], name: str, origin: str) -> dict[str, Any]:
    """An object inside a config, empty if it is absent; ValueError if it is something else."""
    part = fields.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{origin}: {name} is {part!r}; accepted: an object")
    return part


def check_numbers(fields: Mapping[str, Any], names: Sequence[str], origin: str) -> None:
    """Raises ValueError for fields that are no numbers above 0, or whole ones unless `*_eps`."""
    for name in names:
        value = fields.get(name)
        accepted = (int, float) if name.endswith("_eps") else (int,)
        if type(value) not in accepted or value <= 0:
            kind = "a" if float in accepted else "a whole"
            raise ValueError(f"{origin}: {name} is {value!r}; accepted: {kind} number above 0")


def with_defaults(fields: dict[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
    """A config with the defaults that `transformers` has for what it leaves out.

    Args:
      needed: fields; a config that states all of them is given back as it is.
    """
    if needed and all(name in fields for name in needed):
        return fields
    # Seconds to import, and most language models state everything.
    from transformers import AutoConfig  # noqa: PLC0415

    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields).to_dict()
    # Its checks of fields raise errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config of type {kind!r} is refused by transformers: {reason}") from None
