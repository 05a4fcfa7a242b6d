"""Distil large multimodal models into small sparse ones, in JAX.

import moddistill
model, params = moddistill.load("runs/demo/preference/model")
output = model.apply({"params": params}, batch)
"""

import logging
from typing import Any

from moddistill.errors import escape_logged

__version__ = "0.1.0"

# Names and values of untrusted files are in messages.
logging.getLogger("moddistill").addFilter(escape_logged)


def __getattr__(name: str) -> Any:
    """`load`, imported when first used: reading records needs no accelerator stack."""
    if name == "load":
        from moddistill.convert.resolve import load  # noqa: PLC0415

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
