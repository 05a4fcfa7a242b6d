"""Distil large multimodal models into small sparse ones, in JAX.

import moddistill
model, params = moddistill.load("runs/demo/preference/model")
output = model.apply({"params": params}, batch)
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, imported when first used: reading records needs no accelerator stack."""
    if name == "load":
        from moddistill.convert.resolve import load  # noqa: PLC0415

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
