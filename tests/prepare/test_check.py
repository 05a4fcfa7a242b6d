import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moddistill.config import ColumnsConfig
from moddistill.data.examples import encode_sides
from moddistill.data.forms import parse_record
from moddistill.data.image_decoding import ImageRules
from moddistill.data.tokenizer import train_bpe
from moddistill.prepare import examine as examine_module
from moddistill.prepare.__main__ import main
from moddistill.prepare.check import check
from moddistill.prepare.examine import ExamineSpec
from moddistill.prepare.sections import make_sections
from tests.prepare.conftest import image, talk, write_json
from tests.reports.test_report import Balance

RED, BLUE = image((255, 0, 0), (30, 20)), image((0, 0, 255), (50, 40), "JPEG")
PAIR = {"question": "Is it?", "chosen": "yes", "rejected": "no"}
RECORDS = [
    talk("red.png", id="1"),
    talk("red.png", id="2"),
    talk("blue.jpg", answer="A cat."),
    talk("damaged.png"),
    talk("missing.png"),
    PAIR,
    talk("red.png", question="<image> or this?") | {"image": ["red.png", "blue.jpg"]},
    {},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.jpg").write_bytes(BLUE)
    (tmp_path / "damaged.png").write_bytes(image(size=(90, 90))[:150])
    write_json(tmp_path / "a.json", RECORDS)
    return tmp_path


def spec(folder, **fields):
    rules = ImageRules(pad_color=(0, 0, 0))
    return ExamineSpec(images=str(folder), columns=ColumnsConfig(), rules=rules, **fields)


def tables(findings, max_length=0):
    """Returns {title: {first cell: other cells}}."""
    return {
        section.title: {next(iter(row.values())): [*row.values()][1:] for row in section.rows}
        for section in make_sections(findings, max_length)
    }


def test_counts_formats_and_duplicates_are_those_of_the_records(folder):
    found = tables(check(str(folder / "a.json"), spec(folder), 0))
    assert found["Records"] == {
        "records": [8],
        "usable": [5],
        "rejected": [3],
        "conversations": [4],
        "preference pairs": [1],
        "with images": [4],
        "without images": [1],
        "turns": [5],
        "images": [5],
    }
    assert found["Images"] == {"PNG": [3, 0.6], "JPEG": [2, 0.4]}
    # The ids of the first two records differ.
    assert found["Duplicates"] == {"records": [5, 4, 1], "images": [5, 2, 3]}
    assert sum(count for (count,) in found["Rejected"].values()) == 3
    assert "Lengths" not in found


def test_damaged_pixels_are_found(folder):
    found = check(str(folder / "a.json"), spec(folder), 0)
    kinds = found.reasons.commonest(9)
    assert kinds["expected a readable image"]["count"] == 2
    assert "a.json, record 4: " in kinds["expected a readable image"]["example"]
    assert found.records["is_usable"].tolist() == [1, 1, 1, 0, 0, 1, 1, 0]
    assert found.images["record"].tolist() == [0, 1, 2, 6, 6]


def test_duplicates_name_the_first_record(folder):
    findings = check(str(folder / "a.json"), spec(folder), 0)
    [section] = [each for each in make_sections(findings) if each.title == "Duplicates"]
    path = folder / "a.json"
    assert section.items == (
        f"2 equal records: first in {path}, record 1",
        f"3 equal images: first in {path}, record 1",
        f"2 equal images: first in {path}, record 3",
    )


def test_records_with_the_same_text_and_other_images_are_not_equal(folder):
    write_json(folder / "b.json", [talk("red.png"), talk("blue.jpg"), talk(), talk(system="x")])
    found = tables(check(str(folder / "b.json"), spec(folder), 0))
    assert found["Duplicates"]["records"] == [4, 4, 0]


def as_jsonl(folder, records):
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "b.jsonl"


def as_parquet(folder, records):
    data = {"red.png": RED, "blue.jpg": BLUE}
    rows = []
    for record in records:
        names = record.get("image", [])
        names = names if isinstance(names, list) else [names]
        images = [{"path": name, "bytes": data.get(name, b"x")} for name in names]
        kept = {key: value for key, value in record.items() if key not in ("image", "id")}
        rows.append(kept | {"images": images})
    columns = {name: [row.get(name) for row in rows] for name in {k for row in rows for k in row}}
    pq.write_table(pa.table(columns), folder / "b.parquet", row_group_size=3)
    return folder / "b.parquet"


def as_array_records(folder, records):
    write_json(folder / "b.json", records)
    flags = ("--images", str(folder), "--to", str(folder / "shards"), "--workers", "0")
    main(["json", "--from", str(folder / "b.json"), *flags])
    return folder / "shards/*.array_record"


@pytest.mark.parametrize("convert", [as_jsonl, as_parquet, as_array_records])
def test_every_format_has_the_same_numbers(folder, convert):
    usable = [record for i, record in enumerate(RECORDS) if i not in (3, 4, 7)]
    expected = check(str(folder / "a.json"), spec(folder), 0)
    found = check(str(convert(folder, usable)), spec(folder), 0)
    usable_rows = expected.records[expected.records["is_usable"]]
    np.testing.assert_array_equal(found.records, usable_rows)
    for name in ("digest", "width", "height", "bytes", "format"):
        np.testing.assert_array_equal(found.images[name], expected.images[name])


def test_blocks_files_and_workers_do_not_change_numbers(folder, monkeypatch):
    write_json(folder / "b.json", RECORDS[::-1])
    path, tokenizer = str(folder / "[ab].json"), train_bpe(["a dog"], 300)
    expected = check(path, spec(folder, tokenizer=tokenizer), 0)
    parallel = check(path, spec(folder, tokenizer=tokenizer), 2)
    monkeypatch.setattr(examine_module, "_AT_ONE_TIME", 3)
    blocks = check(path, spec(folder, tokenizer=tokenizer), 0)
    assert len(expected.records) == 16
    assert expected.images["record"].max() == 15
    for found in (parallel, blocks):
        np.testing.assert_array_equal(found.records, expected.records)
        np.testing.assert_array_equal(found.images, expected.images)
        assert found.reasons.commonest(9) == expected.reasons.commonest(9)
    assert expected.place(8) == f"{folder}/b.json, record 1"


def test_lengths_are_those_of_samples(folder):
    tokenizer = train_bpe(["What is this? A dog."], 300)
    answers = ["x" * n for n in (1, 30, 60, 200)]
    write_json(folder / "b.json", [talk("red.png", answer=answer) for answer in answers] + [PAIR])
    options = {"tokenizer": tokenizer, "template": "chatml", "image_tokens": 7}
    findings = check(str(folder / "b.json"), spec(folder, **options), 0)
    place = {"file": "", "line": 1, "image_root": ""}
    records = [parse_record(talk("x", answer=a), kind="conversation", **place) for a in answers]
    records.append(parse_record(PAIR, kind="preference", **place))
    lengths = [
        max(len(side.tokens) for side in encode_sides(record, "chatml", tokenizer, 7))
        for record in records
    ]
    assert findings.records["tokens"].tolist() == lengths
    limit = lengths[2]
    [section] = [each for each in make_sections(findings, limit) if each.title == "Lengths"]
    assert [row["count"] for row in section.rows] == [4, 1, 0]
    assert sum(count for _, count in section.bars) == 5
    assert section.bars[-1] == ("more", 1)
    counts = {tuple(map(int, re.findall(r"\d+", label))): n for label, n in section.bars[:-1]}
    for (low, high), count in counts.items():
        assert count == sum(low <= length <= high for length in lengths)
    left_out = tables(findings, 10)["Lengths"]
    assert left_out["longer, left out"] == [5, 1.0]


def test_a_record_that_the_template_cannot_render_is_rejected_with_its_images(folder):
    two_turns = talk("red.png")["conversations"] + talk()["conversations"]
    records = [{"conversations": two_turns, "image": "red.png"}, talk("blue.jpg")]
    write_json(folder / "b.json", records)
    options = {"tokenizer": train_bpe(["a dog"], 300), "template": "plain"}
    findings = check(str(folder / "b.json"), spec(folder, **options), 0)
    assert findings.records["is_usable"].tolist() == [False, True]
    assert findings.images["record"].tolist() == [1]
    [found] = findings.reasons.commonest(9).values()
    assert "record 1: " in found["example"]


def test_many_files_are_one_row_after_the_first(folder):
    for number in range(25):
        write_json(folder / f"many-{number:02d}.json", [talk()] * (number + 1))
    rows = tables(check(str(folder / "many-*.json"), spec(folder), 0))["Files"]
    assert len(rows) == 20
    assert rows[f"{folder}/many-18.json"] == [19, 19, 0]
    assert rows["6 others"] == [20 + 21 + 22 + 23 + 24 + 25] * 2 + [0]


def test_percentiles_are_those_of_usable_records(folder):
    sizes = [(width, 10) for width in range(100, 201)]
    for width, height in sizes:
        (folder / f"{width}.png").write_bytes(image(size=(width, height)))
    write_json(folder / "b.json", [talk(f"{width}.png") for width, _ in sizes] + [{}] * 50)
    findings = check(str(folder / "b.json"), spec(folder), 0)
    [section] = [each for each in make_sections(findings) if each.title == "Distributions"]
    [row] = [row for row in section.rows if row["name"] == "width of an image"]
    assert row == {
        "name": "width of an image", "least": 100, "5 %": 105, "25 %": 125, "50 %": 150,
        "75 %": 175, "95 %": 195, "most": 200, "mean": 150,
    }  # fmt: skip


def run(folder, *flags):
    main(["check", str(folder / "a.json"), "--workers", "0", *map(str, flags)])


def test_the_command_prints_tables_and_writes_one_page(folder, capsys):
    train_bpe(["a dog"], 300).save(str(folder / "tokenizer"))
    page = folder / "check.html"
    run(folder, "--images", folder, "--tokenizer", folder / "tokenizer", "--html", page)
    text = capsys.readouterr().out
    assert "| rejected         |      3 |" in text
    assert "| up to 2,048 tokens |      5 |" in text
    html = page.read_text()
    parsed = Balance(html)
    assert parsed.links == []
    assert "url(" not in html
    for title in ("Records", "Files", "Distributions", "Lengths", "Images", "Duplicates"):
        assert f"<h2>{title}</h2>" in html
        assert f"## {title}" in text
    assert html.count('class="bar image"') == 17


def test_names_of_a_source_are_escaped(folder, capsys):
    page = folder / "check.html"
    write_json(folder / "a.json", [talk(), {"<script>\x1b[2J": 1, "messages": "<b>"}])
    (folder / "a.json").rename(folder / "<i>.json")
    main(["check", str(folder / "<i>.json"), "--workers", "0", "--html", str(page)])
    Balance(page.read_text())
    assert not re.search("<b>|<i>|<script>", page.read_text())
    assert "\x1b" not in page.read_text() + capsys.readouterr().out


def test_named_images_without_a_folder_are_rejected(folder, capsys):
    run(folder)
    assert "a folder by --images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        ([{}], (), "expected a usable record, got none"),
        ([], (), "expected records, got none"),
        ([talk()], ("--images", "missing"), "--images: expected an existing folder, got 'missing'"),
        ([talk()], ("--tokenizer", "missing"), "missing"),
        ([talk()], ("--html", "missing/x.html"), "--html: expected a file in an existing folder"),
    ],
)
def test_a_source_that_cannot_be_used_is_an_error(folder, records, flags, message):
    write_json(folder / "a.json", records)
    with pytest.raises(SystemExit, match=message):
        run(folder, *flags)
