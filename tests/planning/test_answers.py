import dataclasses
import json
import math

import pytest

from moddistill import plan
from moddistill.inference.prompts import bucket
from moddistill.models.presets import preset
from moddistill.planning import answers
from moddistill.planning.answers import format_answer, lower_answer, plan_answer
from moddistill.planning.roofline import answer_size, token_work


def wide():
    """Wide enough for matmuls to be nearly all the work, with an image of 4 patches."""
    config = preset("tiny")
    decoder = dataclasses.replace(
        config.decoder,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
    )
    vision = dataclasses.replace(config.vision, hidden_size=128, intermediate_size=256)
    return dataclasses.replace(config, decoder=decoder, vision=vision)


CONFIG = wide()
# Lengths without padding: the prompt and the whole row are as long as their buckets.
SIZE = answer_size(CONFIG, rows=2, text_tokens=60, images=1, new_tokens=16)


@pytest.fixture(scope="module")
def programs():
    lowered = lower_answer(CONFIG, SIZE, "cpu", "float32")
    return {name: each.compile() for name, each in lowered.items()}


@pytest.fixture(scope="module")
def report():
    return plan_answer(CONFIG, SIZE, ["cpu", "v5e"], "float32", compiled=False)


def test_lengths_of_this_test_have_no_padding():
    assert bucket(SIZE.prompt_tokens) == SIZE.prompt_tokens == 64
    assert SIZE.slots == 80


def test_flops_are_those_that_the_compiler_counts(programs, report):
    """XLA counts the scores of a token against all slots, here 80 in place of 72."""
    for name in ("prefill", "token"):
        counted = programs[name].cost_analysis()["flops"]
        assert report[f"{name}_flops"] == pytest.approx(counted, rel=0.04), name


def test_no_program_reads_less_than_the_bound(programs, report):
    """XLA counts what every operation reads and writes, activations included."""
    for name in ("prefill", "token"):
        counted = programs[name].cost_analysis()["bytes accessed"]
        assert report[f"{name}_bytes"] < counted, name
    token = programs["token"].cost_analysis()["bytes accessed"]
    assert token < 2 * report["token_bytes"]


def test_parameters_and_cache_are_the_arguments_of_the_programs(programs, report):
    """All but the inputs of a call: token ids, images, random keys and counts."""
    held = report["parameter_bytes"] + report["cache_bytes"]
    found = programs["prefill"].memory_analysis().argument_size_in_bytes
    images = SIZE.rows * 3 * CONFIG.vision.image_size**2
    assert held == pytest.approx(found - images, abs=4096)


def test_temporary_memory_is_what_the_programs_take_beyond(programs):
    found = answers.temporary_bytes(CONFIG, SIZE, "cpu", "float32")
    memory = [each.memory_analysis() for each in programs.values()]
    # The state of the answers is donated, so that only the new tokens are outputs.
    assert max(x.temp_size_in_bytes for x in memory) <= found
    assert found <= max(x.temp_size_in_bytes for x in memory) + 1024


def test_answer_is_the_prompt_and_a_step_for_each_further_token(report):
    assert report["answer_flops"] == report["prefill_flops"] + 15 * report["token_flops"]
    chip = report["chips"]["v5e"]
    seconds = chip["prefill_seconds"] + 15 * chip["token_seconds"]
    assert chip["answer_seconds"] == pytest.approx(seconds)
    assert chip["tokens_per_second"] == pytest.approx(2 * 16 / seconds)
    work = token_work(CONFIG, SIZE, "float32")
    assert chip["token_seconds"] == pytest.approx(work.bytes / 0.819e12)


def test_this_machine_has_no_bounds_since_its_speed_is_not_known(report):
    assert report["chips"]["cpu"] == {"temp_bytes": None, "peak_bytes": None, "fits": None}


def test_model_that_is_too_large_does_not_fit_without_compiling():
    """Qwen-7B takes 15.0 GiB and a row of its cache 0.34; 15.5 of a v5e's 16 GiB are usable."""
    config = preset("qwen1.5-7b")
    size = answer_size(config, rows=2, text_tokens=64, images=1, new_tokens=48)
    chips = plan_answer(config, size, ["v5e", "h100"], "bfloat16", compiled=False)["chips"]
    assert chips["v5e"]["fits"] is False
    assert chips["h100"]["fits"] is None  # temporary memory is not known


@pytest.mark.parametrize(("temporary", "fits"), [(2**20, True), (2**34, False), (None, False)])
def test_answers_fit_with_their_temporary_memory(temporary, fits, monkeypatch):
    """None: the compiler ran out of memory."""
    monkeypatch.setattr(answers, "temporary_bytes", lambda *_: temporary)
    chip = plan_answer(CONFIG, SIZE, ["v5e"], "float32", compiled=True)["chips"]["v5e"]
    assert chip["fits"] is fits


def test_command_prints_a_row_for_each_chip(capsys):
    args = ["--answer", "random:qwen2-0.5b", "--num_experts", "4", "--bounds_only", "--chip"]
    plan.main([*args, "v5e", "h100"])
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "answers 1 of 48 tokens, bfloat16"
    assert " ".join(lines[1].split()) == "prompts 640 tokens; images: 1"
    assert "1.270 G, 0.944 G active; 2.37 GiB" in lines[2]
    assert [line.split()[0] for line in lines[-3:]] == ["chip", "v5e", "h100"]
    plan.main([*args, "v5e", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert math.isclose(found["chips"]["v5e"]["prefill_seconds"], found["prefill_flops"] / 197e12)


def test_format_shows_what_is_not_known_as_a_dash(report):
    *_, cpu, v5e = format_answer(report).splitlines()
    assert cpu.split() == ["cpu", "-", "-", "-"]
    assert v5e.split()[1:4] == ["-", "-", "-"]
