"""Records that are left out: listed once, padding in their rows, and a limit to their number."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from moddistill.data.pipeline import check_left_out, list_left_out
from moddistill.data.quarantine import Quarantine
from tests.data.streams import take, talk


def listed(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {(item["file"], item["line"]): item["reason"] for item in lines}, len(lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_listed_once_and_in_no_batch(
    workers, stream, data_config, partly_bad, answers, tmp_path
):
    config = data_config(partly_bad, max_rejected=0.5, workers=workers)
    batches = stream(config, batch_size=1)
    list_left_out(batches._maker.sources, tmp_path)
    epoch = batches._maker.plan.rows_of(1)
    order = sum(answers(*take(batches, 4 * epoch)), ())
    batches.close()
    assert Counter(order) == {str(number): 4 for number in range(10)}
    list_left_out(batches._maker.sources, tmp_path)  # as another start does
    reasons, lines = listed(tmp_path / "quarantine.jsonl")
    assert lines == len(reasons) == Quarantine(str(tmp_path / "quarantine.jsonl")).count == 3
    assert "broken.png" in reasons[partly_bad, 11]
    assert "an answer token within data.max_length 160" in reasons[partly_bad, 12]
    assert reasons[partly_bad, 13] == "answer: expected a text that is not blank, got ''"


def test_bad_record_shifts_no_other(stream, data_config, partly_bad, tmp_path, answers):
    config = data_config(partly_bad, max_rejected=0.5)
    with_bad = answers(*take(stream(config), 6))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes())
    without = answers(*take(stream(config), 6))
    assert with_bad != without
    assert with_bad == [tuple(answer for answer in row if answer != "10") for row in without]


def test_truncated_records_are_used_and_listed_once(
    stream, data_config, data_file, answers, tmp_path
):
    path = data_file([talk("q", "1"), talk("q", "two " * 200)])
    batches = stream(data_config(path))
    for _ in range(2):
        list_left_out(batches._maker.sources, tmp_path)
    reasons, lines = listed(tmp_path / "truncated.jsonl")
    assert lines == 1
    assert reasons[path, 2].endswith("tokens are truncated to 160")
    assert not (tmp_path / "quarantine.jsonl").exists()
    assert any(answer.startswith("two two") for row in answers(next(batches)) for answer in row)


@pytest.mark.parametrize("workers", [0, 1])
def test_run_stops_when_too_many_records_turn_out_to_be_bad(
    workers, stream, data_config, data_file, image_file, tmp_path
):
    image_file()
    records = [talk("<image>", str(n), image="a.png" if n % 4 else "gone.png") for n in range(40)]
    batches = stream(data_config(data_file(records), max_rejected=0.2, workers=workers))
    message = (
        r"^config\.data\.sources\.source0: expected at most 20\.0% of 40 records to be left out "
        r"\(config\.data\.max_rejected\), got (9|10): .*; see .*quarantine\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        take(batches, 40)
    batches.close()


def test_left_out_records_count_from_the_start(stream, data_config, partly_bad, tmp_path, caplog):
    batches = stream(data_config(partly_bad))
    [source] = batches._maker.sources
    with caplog.at_level(logging.INFO, "moddistill"):
        list_left_out([source], tmp_path)
    name = "config.data.sources.source0"
    assert f"{name}: 11 of 13 records are used" in caplog.text
    assert (
        f"{name}: 2 of 13 records are left out (1 x expected a text that is not blank (such as "
        f"{source.config.path}, record 13: answer: expected a text that is not blank, got ''); 1 x "
        "expected all images and an answer token"
    ) in caplog.text
    check_left_out(source, 0.2, tmp_path / "quarantine.jsonl")
    with pytest.raises(
        ValueError, match=r"at most 10\.0% of 13 records .* got 2: 1 x expected a text"
    ):
        check_left_out(source, 0.1, tmp_path / "quarantine.jsonl")
