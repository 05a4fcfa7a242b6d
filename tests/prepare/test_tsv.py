import base64
import re

import pytest

from tests.prepare.conftest import image, read_rejected, read_shards

HEADER = ("index", "image", "question", "hint", "A", "B", "C", "answer")
BASE64 = base64.b64encode(image()).decode()


def row(index, **cells):
    filled = {"index": index, "image": BASE64, "question": "Which?", "answer": "A"} | cells
    return [str(filled.get(name, "")) for name in HEADER]


def write_tsv(path, rows, header=HEADER, end="\n"):
    """Writes a table as pandas does: cells with quotes or line breaks are quoted."""

    def cell(text):
        quoted = re.search('["\t\r\n]', text)
        return '"' + text.replace('"', '""') + '"' if quoted else text

    lines = ["\t".join(map(cell, cells)) for cells in (header, *rows)]
    path.write_text("".join(line + end for line in lines), newline="")
    return path


def turns(record):
    return [turn["value"] for turn in record["conversations"]]


def test_questions_have_hint_and_options_in_the_reference_s_order(tmp_path, prepare):
    rows = [
        row(7, hint="Look left.", A="a cat", B="a dog", C="nan", answer="B"),
        row(8, hint="nan", question="What is it?", answer="a tree"),
    ]
    first, second = read_shards(prepare("tsv", "--from", write_tsv(tmp_path / "a.tsv", rows)))
    assert turns(first) == [
        "<image>\nLook left.\nWhich?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly.",
        "B",
    ]
    assert turns(second) == ["<image>\nWhat is it?", "a tree"]
    assert (first["id"], second["id"]) == ("7", "8")
    assert first["images"] == [{"path": "", "bytes": image()}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_may_have_quotes_tabs_and_line_breaks(tmp_path, prepare, end):
    questions = ['Say "x"', "a\nb\n\nc", "a\tb", '"', '"\n"', 'five 5" pipes', "\u2028"]
    rows = [row(i, question=text) for i, text in enumerate(questions)]
    folder = prepare("tsv", "--from", write_tsv(tmp_path / "a.tsv", rows, end=end))
    assert [turns(record)[0] for record in read_shards(folder)] == [
        f"<image>\n{text}" for text in questions
    ]


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path, prepare):
    path = write_tsv(tmp_path / "a.tsv", [row(1), row(2)])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xef\xbb\xbf" + first + second + b"\n\n" + third.rstrip())
    folder = prepare("tsv", "--from", path)
    assert [record["id"] for record in read_shards(folder)] == ["1", "2"]


def test_images_may_be_named_and_absent(tmp_path, prepare):
    header = ("question", "answer", "image_path")
    (tmp_path / "x.png").write_bytes(image())
    path = write_tsv(tmp_path / "a.tsv", [("What?", "A", "x.png"), ("Why?", "B", "")], header)
    first, second = read_shards(prepare("tsv", "--from", path, "--images", tmp_path))
    assert first["images"] == [{"path": "x.png", "bytes": image()}]
    assert (turns(second), second.get("images")) == (["Why?", "B"], None)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(2, image="7"), "image: expected base64 of an image, got '7'"),
        (row(2, image="@@@@"), "image: expected base64 of an image, got '@@@@'"),
        (row(2, image=base64.b64encode(b"text").decode()), "expected a readable image"),
        (row(2, A="x", B="y", answer="C"), "answer: expected one of the options, got 'C'"),
        (row(2, answer=""), "answer: expected a text that is not blank"),
        (row(2)[:-1], "cells of the row: expected 8, as in the header, got 7"),
        ([*row(2), "x"], "cells of the row: expected 8, as in the header, got 9"),
    ],
)
def test_a_bad_row_is_rejected_and_its_neighbours_are_not(tmp_path, prepare, bad, reason):
    path = write_tsv(tmp_path / "a.tsv", [row(1), bad, row(3)])
    folder = prepare("tsv", "--from", path)
    assert [record["id"] for record in read_shards(folder)] == ["1", "3"]
    [(line, text)] = read_rejected(folder)
    assert line == 2
    assert reason in text


@pytest.mark.parametrize(
    "line", [b'2\t"never ends\tx\n', b'2\t"a"b\n', b"2\t\xff\xfe\n", b'"' * 7 + b"\n"]
)
def test_a_row_that_does_not_parse_costs_no_other_row(tmp_path, prepare, line):
    path = write_tsv(tmp_path / "a.tsv", [row(1), row(3, question="a\nb")])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    folder = prepare("tsv", "--from", path)
    assert [record["id"] for record in read_shards(folder)] == ["1", "3"]
    [(number, reason)] = read_rejected(folder)
    assert number == 2
    assert "row: expected tab-separated UTF-8 text" in reason


def test_a_row_beyond_the_limit_is_rejected_without_being_read(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr("moddistill.prepare.tsv.LARGEST_RECORD", 2000)
    long = row(2, question="x" * 5000)
    path = write_tsv(tmp_path / "a.tsv", [row(1), long, row(3), row(4, question="y\n" * 3000)])
    folder = prepare("tsv", "--from", path)
    assert [record["id"] for record in read_shards(folder)] == ["1", "3"]
    assert read_rejected(folder)[0] == (2, "bytes of the row: expected <= 2,000, got 5114")


def test_a_header_without_question_or_answer_is_refused(tmp_path, prepare):
    path = write_tsv(tmp_path / "a.tsv", [("a", "b")], ("question", "x"))
    with pytest.raises(SystemExit) as error:
        prepare("tsv", "--from", path)
    assert "expected a column 'answer'" in str(error.value)
