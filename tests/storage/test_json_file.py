import json

import pytest

from moddistill.storage.json_file import read_json, write_json


def test_written_object_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"name": "größe", "sizes": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"name": "größe", "sizes": [1, 2.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"steps": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"steps": 2})
    assert json.loads(file.read_text()) == {"steps": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_not_written(value, tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []
