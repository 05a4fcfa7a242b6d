"""Files of the installed lmms-eval, by themselves: the whole of it needs gigabytes."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest


def lmms_eval():
    """The folder of the package; skips the test if it is not installed."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    return Path(spec.submodule_search_locations[0])


def load_file(path, unused):
    """The module of a file, in which each of the modules `unused` is a mock."""
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in unused}):
        spec = importlib.util.spec_from_file_location("utils", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
