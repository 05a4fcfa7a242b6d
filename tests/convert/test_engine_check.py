"""`check` lists what engines refuse of an export, once, each with what to do."""

import json
import logging
import shutil

import pytest
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from moddistill.convert.engine_check import ENGINES, check_engine
from moddistill.convert.engine_rules import RULES
from moddistill.convert.exporting import export_model
from moddistill.convert_weights import main
from moddistill.storage.json_file import write_json
from tests.convert.greedy import answer_in_transformers

GB = 10**9


@pytest.fixture(scope="module")
def exports(sparse, tmp_path_factory):
    """Folders of one sparse student with heads of 8, exported as it is, padded and uniform."""
    student, out, _ = sparse("CLIP and Qwen2")
    root = tmp_path_factory.mktemp("exports")
    for name, options in {"padded": {"vocabulary": "padded"}, "uniform": {"uniform": True}}.items():
        export_model(student, root / name, max_shard_size=GB, **options)
    return {"cut": out, "padded": root / "padded", "uniform": root / "uniform"}


@pytest.fixture
def edited(exports, tmp_path):
    """Returns a function for a copy of an export with other fields in `config.json`."""

    def make(**fields):
        folder = tmp_path / "edited"
        shutil.copytree(exports["cut"], folder)
        (folder / "digests.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | fields)
        return folder

    return make


def faults(folder, engine):
    """The lines of an error after the first; none if nothing is refused."""
    try:
        check_engine(folder, engine)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first == f"{folder}: {engine} refuses this export:"
        return [line.strip() for line in lines]
    return []


@pytest.mark.parametrize(
    ("name", "engine", "starts"),
    [
        ("cut", "transformers", []),
        ("padded", "transformers", []),
        ("cut", "vllm", ["head_dim 8"]),
        ("padded", "vllm", ["{} of 320 embedding rows are no tokens", "head_dim 8"]),
        (
            "cut",
            "sglang",
            ["dense layers [1, 3]", "vision_feature_sel", "a vision encoder of type"],
        ),
        ("uniform", "sglang", ["vision_feature_select_strategy 'default'", "a vision encoder of"]),
        (
            "uniform",
            "llama.cpp",
            ["a vision encoder", "router weights of the top 2", "a tokenizer"],
        ),
    ],
)
def test_faults_of_an_export(name, engine, starts, exports, small_tokenizer):
    found = faults(exports[name], engine)
    padding = 320 - small_tokenizer.image_id - 1
    assert len(found) == len(starts)
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start.format(padding)), line


def test_every_fault_says_what_to_do_and_which_file_of_the_engine_decides(exports):
    [line] = [x for x in faults(exports["padded"], "sglang") if "embedding rows" in x]
    assert line.endswith(
        "and can be generated: export with --vocabulary cut, as the engine ignores suppress_tokens "
        "(sglang/srt/configs/model_config.py)"
    )
    for rule in RULES:
        assert rule.remedy
        assert rule.origins.keys() <= set(ENGINES)
        assert all(rule.origins.values())


def test_missing_files_rows_and_tensors_are_found_together(edited, exports):
    text = json.loads((exports["cut"] / "config.json").read_text())["text_config"]
    rows = text["vocab_size"] - 1
    folder = edited(text_config=text | {"vocab_size": rows})
    (folder / "processor_config.json").unlink()
    tensors, *found = [x for x in faults(folder, "transformers") if "embed" not in x[:30]]
    assert "tensors do not fit the architecture" in tensors
    assert [line.split(":")[0] for line in found if "has shape" not in line] == [
        f"image_token_index {rows} is not among the {rows} embedding rows",
        "no processor_config.json",
    ]


def test_tensors_that_do_not_fit_the_config_are_listed(edited):
    folder = edited()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mlp_only_layers"] = [1]
    write_json(folder / "config.json", config)
    text = "\n".join(faults(folder, "vllm"))
    assert "missing language_model.model.layers.3.mlp.experts.0.down_proj.weight" in text
    assert "unexpected language_model.model.layers.3.mlp.down_proj.weight" in text


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nothing", "'.*nothing': expected an export, got a folder without config.json"),
        ("model", "'.*student': expected an export, got a model folder; export it first"),
        ("llama", r"architectures: expected one of .*, got \['LlamaForCausalLM'\]"),
    ],
)
def test_folder_that_is_no_export_is_an_error(folder, message, tmp_path, edited, sparse):
    if folder == "model":
        path = sparse("CLIP and Qwen2")[0]
    else:
        path = (
            edited(architectures=["LlamaForCausalLM"]) if folder == "llama" else tmp_path / folder
        )
    with pytest.raises(ValueError, match=message):
        check_engine(path, "vllm")


def test_command_exits_with_an_error_or_says_that_the_engine_loads_it(exports, capsys):
    main(["check", str(exports["cut"]), "--engine", "transformers"])
    assert capsys.readouterr().out == f"{exports['cut']}: transformers loads it, by 2 rules\n"
    for engine, message in (
        ("vllm", r"(?s)error: .*: vllm refuses this export:\n  head_dim 8, which its attention"),
        ("vlm", r"error: --engine: expected one of .*did you mean 'vllm'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["check", str(exports["cut"]), "--engine", engine])


@pytest.mark.parametrize("name", ["cut", "uniform"])
def test_transformers_loads_and_answers_without_a_warning(name, exports, caplog):
    """Neither of the tokenizer, nor of the processor, the weights or the settings."""
    transformers.utils.logging.enable_propagation()
    try:
        model = AutoModelForImageTextToText.from_pretrained(exports[name]).eval()
        answer_in_transformers(model, exports[name], Image.new("RGB", (12, 12)), "is it red?", 4)
    finally:
        transformers.utils.logging.disable_propagation()
    assert [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING] == []
