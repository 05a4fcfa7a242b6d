import json
import os
import subprocess
import sys
from pathlib import Path

from moddistill.data.quarantine import Quarantine, Rejected


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


def test_incomplete_last_line_is_not_counted(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"file": "f", "line": 1, "reason": "a\u2028b"}\n{"file": "f", "li')
    assert Quarantine(str(path)).count == 1
