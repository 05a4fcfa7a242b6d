"""The paper's data in experiments/data.py, and the full-size experiments that read it."""

import dataclasses
import importlib
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from experiments import data
from moddistill.data.forms import parse_record
from moddistill.data.records import PreferencePair, Record
from moddistill.training.stages import STAGES

SOURCES = [
    pytest.param(name, source, id=name)
    for stage in data.STAGES.values()
    for name, source in stage.sources.items()
]
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
# A record of each form, with all of its published fields.
RECORDS = {
    "LLaVA": {"id": "7", "image": "a/7.jpg", "conversations": TURNS},
    "RLAIF-V": {
        "ds_name": "RLAIF-V",
        "image": {"bytes": b"x", "path": "7.jpg"},
        "question": "what?",
        "chosen": "this",
        "rejected": "that",
        "origin_dataset": "COCO",
        "origin_split": "{}",
        "idx": "7",
        "image_path": "7.jpg",
    },
}


def test_every_stage_has_sources():
    assert data.STAGES.keys() == STAGES.keys()
    assert all(stage.sources for stage in data.STAGES.values())


@pytest.mark.parametrize(
    ("stage", "published"),
    [
        ("init", 600_000),
        ("sft", 665_000),
        ("d2d", 2_400_000),
        ("d2s", 1_400_000),
        ("preference", 80_000),
    ],
)
def test_records_are_as_many_as_published_or_the_difference_is_stated(stage, published):
    recipe = data.STAGES[stage]
    assert recipe.published == published
    if abs(recipe.records / published - 1) > 0.1:
        assert recipe.unknown


def test_records_are_the_sums_of_the_published_files():
    internvl = 200_000 + 18_317 + 12_413 + 10_211 + 72_318 + 29_765
    assert {name: stage.records for name, stage in data.STAGES.items()} == {
        "init": 1_246_901 - 118_287 - 570_486,  # ShareGPT4V's images, without coco and sam
        "sft": 624_610 + 40_688,  # with and without an image
        "d2d": 1_246_901 + 468_670 + (157 + 220 + 331 + 256) * 1000,
        "d2s": 2_400_000 + internvl,
        "preference": 83_132,
    }


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_a_number_of_records_is_exact_or_said_to_be_unknown(name, source):
    assert source.records % 1000 or source.unknown or source.file == "dvqa_train_200k.jsonl"


def test_no_two_sources_share_a_file():
    paths = [source.values[1].path for source in SOURCES]
    assert len(paths) == len(set(paths)) == len(data.sources("d2d")) + 10


def test_names_of_sources_can_be_set_on_the_command_line():
    """`--config.data.sources.NAME.path`; names are unique, so that stages can be joined."""
    names = [param.values[0] for param in SOURCES]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_records_of_the_form_are_read(name, source):
    kind = "preference" if name in data.STAGES["preference"].sources else "conversation"
    record = parse_record(
        RECORDS[source.form], kind=kind, file="x", line=0, image_root=source.images
    )
    assert isinstance(record, PreferencePair if kind == "preference" else Record)
    assert len(record.images) == 1


def test_every_form_is_used():
    assert {param.values[1].form for param in SOURCES} == set(typing.get_args(data.Form))


@pytest.mark.parametrize(
    ("stage", "models"),
    [
        *((stage, None) for stage in STAGES),
        *((stage, "pair=interleave") for stage in STAGES if stage != "init"),
        *((stage, "pair=long-llava") for stage in STAGES),
    ],
)
def test_sources_of_the_full_size_experiments_are_the_recipe(stage, models):
    config = importlib.import_module(f"experiments.{stage}").get_config(models)
    found = config.to_dict()["data"]["sources"]
    assert {
        name: (each["path"], each["images"], each["weight"]) for name, each in found.items()
    } == {
        name: (each.path, each.images, each.weight)
        for name, each in data.STAGES[stage].sources.items()
    }


def test_unknown_stage_is_an_error():
    with pytest.raises(ValueError, match=r"^stage: expected one of .*, got 'd2b' \(did you mean"):
        data.sources("d2b")


def test_files_are_expected_where_the_printed_command_downloads_them():
    """One file in a folder of its data set, and a pattern."""
    svit = data.STAGES["d2d"].sources["svit"]
    assert svit.path == "data/MoE-LLaVA/train_json/svit_tune_157k.json"
    assert svit.download_command() == (
        "hf download LanguageBind/MoE-LLaVA train_json/svit_tune_157k.json --repo-type dataset "
        "--local-dir data/MoE-LLaVA"
    )
    pairs = data.STAGES["preference"].sources["rlaif_v"]
    assert pairs.path == "data/RLAIF-V-Dataset/RLAIF-V-Dataset_*.parquet"
    assert '--include "RLAIF-V-Dataset_*.parquet" --repo-type' in pairs.download_command()


def test_report_tells_present_files_from_missing_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("data/RLAIF-V-Dataset/RLAIF-V-Dataset_000.parquet", "data/x/geoqa+.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    lines = data.report().splitlines()
    rows = [line.split() for line in lines]
    states = {row[0]: row[2] for row in rows if row[2:3] in (["present"], ["missing"])}
    assert states.keys() == {param.values[0] for param in SOURCES}
    assert [name for name, state in states.items() if state == "present"] == ["rlaif_v"]
    commands = [line.strip() for line in lines if "hf download" in line]
    assert commands == [
        param.values[1].download_command() for param in SOURCES if param.values[0] != "rlaif_v"
    ]


def test_command_prints_records_and_what_is_unknown():
    command = [sys.executable, "-m", "experiments.data"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "d2d: 2,679,571 records (2,400,000 published)\n" in done.stdout
    assert "unknown, d2s: Which records of mobilevlm the paper uses" in done.stdout


def test_weight_counts_in_the_records_of_an_epoch():
    [source] = data.STAGES["init"].sources.values()
    twice = dataclasses.replace(source, weight=2.0)
    assert data.StageData(published=1, sources={"a": source, "b": twice}).records == 3 * 558_128
