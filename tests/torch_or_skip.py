"""torch, imported by the first test that uses it: `from tests import torch_or_skip as torch`.

The extra `test` installs torch on Python 3.11 only, since its later builds are gigabytes. There a
missing torch is an error; on later versions the tests that need it are skipped.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

REASON = "needs torch, which the extra `test` installs on Python 3.11 only"


def load_module() -> ModuleType:
    """torch itself; skips the running test if it is not installed on Python 3.12 or later."""
    if sys.version_info >= (3, 12) and importlib.util.find_spec("torch") is None:
        pytest.skip(REASON)
    return importlib.import_module("torch")


def skip_module() -> None:
    """Skips the module that is imported, under the conditions of `load_module`."""
    if sys.version_info >= (3, 12) and importlib.util.find_spec("torch") is None:
        pytest.skip(REASON, allow_module_level=True)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # what pytest and Python ask of any module
        raise AttributeError(name)
    return getattr(load_module(), name)
