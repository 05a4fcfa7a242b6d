import json

import pytest

from moddistill.prepare.__main__ import main
from tests.prepare.conftest import image, talk, write_json


def test_records_are_shown_as_text_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(image())
    pair = {"question": "Is it?", "chosen": "yes", "rejected": "no\nnever", "system": "Be brief."}
    records = [talk("1.png"), talk("missing.png"), pair, talk(answer="not shown")]
    write_json("a.json", records)
    before = sorted(tmp_path.iterdir())
    main(["json", "--from", "a.json", "--images", ".", "--show", "2"])
    assert sorted(tmp_path.iterdir()) == before
    assert capsys.readouterr().out == (
        "a.json, record 1\n"
        f"  image: 1.png, PNG, 8 x 6, {len(image())} bytes\n"
        "  user: <image>\n"
        "    What is this?\n"
        "  assistant: A dog.\n\n"
        "a.json, record 2\n"
        "  rejected: image: expected a file in ., got 'missing.png'\n\n"
        "a.json, record 3\n"
        "  system: Be brief.\n"
        "  user: Is it?\n"
        "  chosen: yes\n"
        "  rejected: no\n"
        "    never\n\n"
    )


def test_control_characters_are_escaped(tmp_path, capsys):
    path = write_json(tmp_path / "a.json", [talk(answer="a\x1b[2Jb\u202ec\rd\té")])
    main(["json", "--from", path, "--show", "1"])
    assert r"assistant: a\x1b[2Jb\u202ec\rd\té" in capsys.readouterr().out


def test_history_of_a_pair_is_shown(tmp_path, capsys):
    prompt = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    record = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    main(["json", "--from", str(tmp_path / "a.jsonl"), "--show", "5"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:6] == ["user: u", "assistant: a", "user: u", "chosen: yes", "rejected: no"]


def test_show_and_to_exclude_each_other(tmp_path, capsys):
    for flags in ([], ["--show", "1", "--to", str(tmp_path)], ["--show", "0"]):
        with pytest.raises(SystemExit):
            main(["json", "--from", "a.json", *flags])
        assert "--show" in capsys.readouterr().err
