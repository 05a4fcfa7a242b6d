import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moddistill.data.quarantine import Quarantine, Rejected


@pytest.mark.parametrize("line", ['{"file": ["a"], "line": 3}', "[" * 100_000, "1", "\0\0"])
def test_damaged_lines_are_passed_over(line, tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text(line + '\n{"file": "a", "line": 3, "reason": "x"}\n')
    assert Quarantine(str(file)).count == 1


def test_quarantine_contains_each_record_once_across_runs(tmp_path):
    path = str(tmp_path / "run" / "quarantine.jsonl")
    first, second = Rejected("f", 1, "坏 \ud83d"), Rejected("f", 2, "bad")
    assert Quarantine(path).count == 0
    quarantine = Quarantine(path)
    quarantine.add([first])
    quarantine.add([first, second])
    Quarantine(path).add([second, Rejected("g", 2, "bad")])
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [("f", 1), ("f", 2), ("g", 2)]
    assert lines[0]["reason"] == "坏 \ud83d"
    assert quarantine.count == 3


def test_processes_share_a_quarantine_without_lost_or_mixed_lines(tmp_path):
    path = str(tmp_path / "quarantine.jsonl")
    code = (
        "import sys; from moddistill.data.quarantine import *\n"
        "for line in range(200):\n"
        "    Quarantine(sys.argv[1]).add([Rejected(sys.argv[2], line, 'x' * 200)])"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, path, name], env=environment)
        for name in ("a", "b")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(Path(path).read_text().splitlines()) == 400
    assert Quarantine(path).count == 400


def test_interrupted_last_line_is_dropped(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"file": "f", "line": 1, "reason": "a\u2028b"}\n{"file": "f", "li')
    quarantine = Quarantine(str(path))
    assert quarantine.count == 1
    quarantine.add([Rejected("f", 2, "bad")])
    assert quarantine.count == Quarantine(str(path)).count == 2
    assert quarantine.counts == {"f": 2}


def test_control_characters_are_escaped_in_the_file(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    reason = "a\x1b[2J\x7f\x9b31m\u202e"
    Quarantine(str(path)).add([Rejected("f", 1, reason)])
    assert path.read_text(encoding="utf-8").rstrip("\n").isprintable()
    assert json.loads(path.read_text(encoding="utf-8"))["reason"] == reason


def test_long_reason_is_shortened(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(str(path)).add([Rejected("f", 1, "x" * 10**6)])
    assert len(path.read_text()) < 600


def test_listing_takes_time_in_proportion_to_the_records(tmp_path):
    """Reading the list again for each record took 150 s for 8,000."""
    quarantine = Quarantine(str(tmp_path / "quarantine.jsonl"))
    start = time.perf_counter()
    for line in range(8000):
        quarantine.add([Rejected("f", line, "bad")])
    assert time.perf_counter() - start < 10
    assert quarantine.count == 8000
