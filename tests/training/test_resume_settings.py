"""Folders that a run may write to."""

import pytest

from moddistill.training.resume import check_is_workdir


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            '{"model_type": "llava"}',
            r"^--workdir: expected a new folder, or .* in config\.json, got",
        ),
        ("config.json", "hyper: parameters", r"or that of a run with its settings in config\.json"),
        ("config.json", "3", r"or that of a run with its settings in config\.json"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": 2.0}\n',
            r"not one with metrics\.jsonl but no config\.json, got",
        ),
        (
            "quarantine.jsonl",
            "mine\n",
            r"not one with quarantine\.jsonl but no config\.json, got",
        ),
        ("truncated.jsonl", "mine\n", r"not one with truncated\.jsonl but no config\.json, got"),
    ],
)
def test_folder_with_files_but_no_run_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        check_is_workdir(tmp_path)
    assert (tmp_path / name).read_text() == content


def test_new_folder_and_folder_of_a_run_are_workdirs(tmp_path):
    check_is_workdir(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    check_is_workdir(tmp_path)
    (tmp_path / "config.json").write_text('{"stage": "sft"}')
    for name in ("metrics.jsonl", "quarantine.jsonl", "truncated.jsonl"):
        (tmp_path / name).touch()
    check_is_workdir(tmp_path)
