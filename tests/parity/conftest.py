import pytest

from tests import torch_or_skip


@pytest.fixture(scope="session", autouse=True)
def _needs_torch():
    torch_or_skip.load_module()
