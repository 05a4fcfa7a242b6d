import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from moddistill.config import ColumnsConfig
from moddistill.data import index, indexing
from moddistill.data.examples import count_tokens
from moddistill.data.forms import parse_record
from moddistill.data.index import IndexSpec, index_folder, open_index


def talk(question, answer, **fields):
    human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    return {"conversations": [human, gpt], **fields}


@pytest.fixture
def spec(small):
    return IndexSpec("conversation", "chatml", 3, small, ColumnsConfig())


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setattr("moddistill.data.places.BLOCK_RECORDS", 2)


@pytest.fixture
def built(monkeypatch):
    """Counts the records that are parsed, while indices are made."""
    parsed = []
    monkeypatch.setattr(
        indexing,
        "parse_record",
        lambda fields, **place: parsed.append(place["line"]) or parse_record(fields, **place),
    )
    return parsed


RECORDS = [
    talk("<image>\nwhat?", "red", image="a.png"),
    talk("q", ""),
    talk("<image> <image>", "a circle", image=["a.png", "b.png"]),
    talk("q", "word " * 50),
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_index_has_place_lengths_and_images_of_each_record(
    name, spec, data_file, small, blocks_of_two
):
    path = data_file(RECORDS, name)
    made = open_index(path, spec, "")
    assert made.images.tolist() == [1, 0, 2, 0]
    assert made.places.line.tolist() == [1, 2, 3, 4]
    for number in (0, 2, 3):
        place = {"kind": "conversation", "file": path, "line": 1, "image_root": ""}
        record = parse_record(RECORDS[number], **place)
        expected = count_tokens(record, "chatml", small, 3)
        assert (made.tokens[number], made.needed[number]) == expected
    assert made.tokens[1] == made.needed[1] == 0
    assert list(made.rejected()) == [(2, "answer: expected a text that is not blank, got ''")]
    assert made.first_named == 1
    content = Path(path).read_bytes()
    for offset, size, record in zip(made.places.offset, made.places.size, RECORDS, strict=True):
        assert json.loads(content[offset : offset + size]) == record


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_index_that_workers_make_is_the_same(name, spec, data_file, blocks_of_two, monkeypatch):
    path = data_file(RECORDS * 3, name)
    indices = []
    for blocks, workers in ((6, 1), (1, 2)):
        monkeypatch.setattr(indexing, "_BLOCKS_WITHOUT_WORKERS", blocks)
        monkeypatch.setattr(indexing, "_WORKERS", workers)
        indices.append(open_index(path, spec, f"{path}.{workers}"))
    first, second = ((x.folder / "columns.bin").read_bytes() for x in indices)
    assert first == second
    assert list(indices[0].rejected()) == list(indices[1].rejected())
    assert [line for line, _ in indices[1].rejected()] == [2, 6, 10]


def test_index_is_next_to_the_file_or_in_a_folder_of_its_own(spec, data_file, tmp_path):
    path = data_file(RECORDS)
    assert open_index(path, spec, "").folder.parent == tmp_path / ".index" / "data.json"
    elsewhere = open_index(path, spec, str(tmp_path / "indices"))
    assert elsewhere.folder.is_relative_to(tmp_path / "indices")


def test_index_is_made_once(spec, data_file, built):
    path = data_file(RECORDS)
    open_index(path, spec, "")
    built.clear()
    again = open_index(path, spec, "")
    assert built == [] and len(again) == 4


def test_file_with_another_time_but_equal_content_is_not_indexed_again(spec, data_file, built):
    path = data_file(RECORDS)
    open_index(path, spec, "")
    built.clear()
    os.utime(path, (1, 1))
    open_index(path, spec, "")
    assert built == []


def test_changed_content_is_indexed_again_even_with_equal_size_and_time(spec, data_file):
    path = data_file(RECORDS)
    before, status = open_index(path, spec, ""), os.stat(path)
    file = Path(path)
    file.write_text(file.read_text().replace("red", "a b"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == status.st_mtime_ns
    after = open_index(path, spec, "")
    assert after.digest != before.digest
    assert after.tokens[0] != before.tokens[0]


@pytest.mark.parametrize(
    "change",
    [
        {"template": "vicuna"},
        {"image_tokens": 4},
        {"kind": "preference"},
        {"columns": ColumnsConfig("q", "a")},
    ],
)
def test_other_settings_have_an_index_of_their_own(change, spec, data_file):
    path = data_file(RECORDS)
    other = IndexSpec(**{**vars(spec), **change})
    assert index_folder(path, other, "") != index_folder(path, spec, "")


def test_interrupted_build_continues_with_the_blocks_that_are_finished(
    spec, data_file, blocks_of_two, built, monkeypatch
):
    path = data_file([talk("q", str(number)) for number in range(16)])
    save, saved = indexing.np.save, []

    def fail_after_four(file, rows):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(save(file, rows))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(indexing.np, "save", fail_after_four)
        open_index(path, spec, "")
    built.clear()
    made = open_index(path, spec, "")
    assert len(made) == 16 and np.all(made.tokens > 0)
    assert built == list(range(9, 17))
    assert not list(made.folder.glob("part-*"))


def test_interrupted_build_of_another_content_is_not_continued(
    spec, data_file, blocks_of_two, built, monkeypatch
):
    path = data_file([talk("q", str(number)) for number in range(6)])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(indexing, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        open_index(path, spec, "")
    data_file([talk("q", f"new {number}") for number in range(6)])
    built.clear()
    open_index(path, spec, "")
    assert sorted(built) == list(range(1, 7))


def test_file_that_changes_while_it_is_indexed_is_an_error(spec, data_file, monkeypatch):
    path = data_file(RECORDS)
    join = indexing._join

    def join_late(*parts):
        data_file(RECORDS[:1])
        return join(*parts)

    monkeypatch.setattr(indexing, "_join", join_late)
    with pytest.raises(ValueError, match=r"data\.json: expected a file that does not change while"):
        open_index(path, spec, "")


def test_folder_that_cannot_be_written_is_an_error_that_names_the_setting(
    spec, data_file, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"index of .*data\.json.*--config\.data\.index=FOLDER"):
        open_index(data_file(RECORDS), spec, str(tmp_path / "file"))


def test_runs_that_start_together_make_an_index_once(spec, data_file):
    path = data_file([talk("q", str(number)) for number in range(50)])
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(open_index(path, spec, ""))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in made] == [50] * 3


def test_file_without_records_has_an_empty_index(spec, data_file):
    assert len(open_index(data_file([]), spec, "")) == 0


@pytest.mark.parametrize("name", ["columns.bin", "index.json"])
@pytest.mark.parametrize("damage", [b"", b"[1]", None])
def test_damaged_index_is_made_again(name, damage, spec, data_file, caplog):
    path = data_file(RECORDS)
    file = open_index(path, spec, "").folder / name
    file.write_bytes(damage) if damage is not None else file.unlink()
    assert open_index(path, spec, "").images.tolist() == [1, 0, 2, 0]
    assert f"{file.parent} is damaged and made again" in caplog.text


@pytest.mark.parametrize("name", ["columns.bin", "index.json", "rejected.jsonl"])
def test_a_changed_byte_of_an_index_is_found(name, spec, data_file, caplog):
    path = data_file(RECORDS)
    file = open_index(path, spec, "").folder / name
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes(changed)
        made = open_index(path, spec, "")
        assert made.images.tolist() == [1, 0, 2, 0] and [n for n, _ in made.rejected()] == [2]
    assert f"{file.parent} is damaged and made again" in caplog.text


def test_damaged_part_of_an_interrupted_build_is_made_again(
    spec, data_file, blocks_of_two, built, monkeypatch
):
    path = data_file(RECORDS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(indexing, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        open_index(path, spec, "")
    building = next(index_folder(path, spec, "").parent.glob("*.partial"))
    (building / "part-00000000.npy").write_bytes(b"damaged")
    built.clear()
    assert open_index(path, spec, "").images.tolist() == [1, 0, 2, 0]
    assert sorted(built) == [1, 2]


@pytest.mark.parametrize("suffix", ["parquet", "array_record"])
def test_changed_content_of_a_binary_file_is_found(suffix, spec, tmp_path):
    """Also far from both ends, where the places of its parts are."""
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(bytes(4 * 2**20))
    before = index._digest(str(file))
    file.write_bytes(bytes(2 * 2**20) + b"x" + bytes(2 * 2**20 - 1))
    assert index._digest(str(file)) != before
