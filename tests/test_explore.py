"""The command of the page: what is refused before a model is loaded, and what is served."""

import socket
import sys

import pytest

from moddistill import explore
from moddistill.explorer.address import listen


def failure(capsys, *args):
    """The line with which the command ends."""
    with pytest.raises(SystemExit) as caught:
        explore.main(list(map(str, args)))
    return str(caught.value.code) + capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org", "::"])
def test_other_machines_need_a_password(capsys, host):
    line = failure(capsys, "--model", "m", "--host", host)
    expected = "expected a loopback address such as 127.0.0.1, or --password with it"
    assert line == f"error: --host: {expected}, got '{host}'"


def test_with_a_password_any_address_is_listened_on():
    with listen("0.0.0.0", 0, "secret") as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = failure(capsys, "--model", "m", "--port", port)
    expected = f"--host, --port: expected a free port, got 127.0.0.1:{port}"
    assert line == f"error: {expected}: Address already in use"


def test_without_gradio_its_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = failure(capsys, "--model", "m", "--port", 0)
    assert line == "error: explore: expected gradio (pip install 'moddistill[explore]'), got none"


@pytest.mark.parametrize(
    "flags", [("--model", "gone"), ("--model", "{sparse}", "--teacher", "gone")]
)
def test_a_model_that_is_not_there_is_named(capsys, monkeypatch, tiny_models, flags):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    flags = (flag.format(**tiny_models) for flag in flags)
    line = failure(capsys, *flags, "--port", 0)
    assert line.startswith("error: expected a model folder") and "got 'gone'" in line
