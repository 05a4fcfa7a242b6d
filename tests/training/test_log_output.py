"""What is printed of errors that cannot be raised."""

import sys
from types import SimpleNamespace

from moddistill.training.log_output import start_logging


def test_only_writes_next_to_one_that_failed_are_not_printed(monkeypatch):
    """TensorStore reports them to a loop of Orbax that is closed."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    start_logging()
    errors = [RuntimeError("Event loop is closed"), RuntimeError("other"), ValueError("x")]
    errors = [SimpleNamespace(exc_value=error) for error in errors]
    for error in errors:
        sys.unraisablehook(error)
    assert printed == errors[1:]
