import sys

import pytest

from tests import torch_or_skip


@pytest.fixture
def without_torch(monkeypatch):
    """`without_torch(minor)`: as on Python 3.minor without torch."""

    def pretend(minor):
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.setattr(sys, "version_info", (3, minor, 0, "final", 0))

    return pretend


def test_missing_torch_is_an_error_on_the_python_that_it_is_installed_on(without_torch):
    without_torch(11)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        _ = torch_or_skip.zeros


@pytest.mark.parametrize("minor", [12, 13])
def test_missing_torch_skips_the_test_that_uses_it_on_later_pythons(without_torch, minor):
    without_torch(minor)
    with pytest.raises(pytest.skip.Exception, match="needs torch"):
        _ = torch_or_skip.zeros
