"""Counting the calls of a function."""


def count_calls(monkeypatch, module, name):
    """Replaces a function by itself and returns the list of the arguments of its calls."""
    calls, original = [], getattr(module, name)

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls
