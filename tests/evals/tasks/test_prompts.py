"""Prompts of the paper's benchmarks: lmms-eval's own where they are those of LLaVA-MoD's reference.

Tasks are read from the YAML files of the installed lmms-eval, and questions rendered by its code.
"""

import importlib

import pytest
import yaml

from moddistill.evals import tasks
from moddistill.evals.tasks.llava_mod import utils
from tests.evals.tasks.installed import lmms_eval, load_file

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# Modules that need the whole of lmms-eval, for scores or downloads; prompts need none of them.
UNUSED = (
    "datasets",
    "lmms_eval.tasks",
    "lmms_eval.tasks._task_utils",
    "lmms_eval.tasks._task_utils.file_utils",
    "lmms_eval.tasks._task_utils.vqa_eval_metric",
)


class Loader(yaml.SafeLoader):
    """Reads `!function` as its name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def config(path):
    """A task with the file that it includes, its functions by the path of their module."""
    found = yaml.load(path.read_text(), Loader)
    if "include" in found:
        found = config(path.parent / found.pop("include")) | found
    return absolute(found, path.parent)


def absolute(value, folder):
    """Replaces names of functions beside the file by names in their package."""
    if isinstance(value, dict):
        return {key: absolute(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [absolute(each, folder) for each in value]
    if isinstance(value, str) and (folder / f"{value.partition('.')[0]}.py").is_file():
        root = folder
        while (root.parent / "__init__.py").is_file():
            root = root.parent
        return ".".join([*folder.relative_to(root.parent).parts, value])
    return value


def task_config(name):
    """The configuration of a task of this library or of lmms-eval."""
    [path] = [
        *tasks.FOLDER.glob(f"*/{name}.yaml"),
        *(lmms_eval() / "tasks").glob(f"*/{name}.yaml"),
    ]
    return config(path)


def rendered(name, doc):
    """The text that a task asks, for a model that it does not name."""
    found = task_config(name)
    module, _, function = found["doc_to_text"].rpartition(".")
    root = tasks.FOLDER.parents[2] if module.startswith("moddistill.") else lmms_eval().parent
    path = root / f"{module.replace('.', '/')}.py"
    text_of = getattr(load_file(path, UNUSED), function)
    return text_of(doc, found["lmms_eval_specific_kwargs"]["default"])


OPTIONS = {"hint": "nan", "question": "Which one?", "A": "one", "B": "two", "C": "nan", "D": "four"}


@pytest.mark.parametrize(
    ("name", "doc", "prompt"),
    [
        ("gqa", {"question": "Is it overcast?"}, f"Is it overcast?{WORD}"),
        (
            "mme",
            {"question": "Is there a dog? Please answer yes or no."},
            f"Is there a dog?{WORD}",
        ),
        (
            "pope",
            {"question": "Is there a car in the image?"},
            f"Is there a car in the image?{WORD}",
        ),
        (
            "textvqa_val_llava_mod",
            {
                "question": "what is the brand of this camera?",
                "ocr_tokens": ["DAKOTA", "DIGITAL", "Single-Use"],
            },
            "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use"
            f"{WORD}",
        ),
        (
            "vizwiz_vqa_val",
            {"question": "What is this?"},
            "What is this?\nWhen the provided information is insufficient, respond with "
            f"'Unanswerable'.{WORD}",
        ),
        (
            "scienceqa_img",
            {"hint": "Look.", "question": "Which?", "choices": ["a cat", "a dog"]},
            f"Context: Look.\nWhich?\nA. a cat\nB. a dog{LETTER}",
        ),
        (
            "scienceqa_img",
            {"hint": "", "question": "Which?", "choices": ["a cat", "a dog"]},
            f"Which?\nA. a cat\nB. a dog{LETTER}",
        ),
        ("mmhal_bench_llava_mod", {"question": "What is it?"}, f"What is it?{WORD}"),
        ("mmbench_en_dev_llava_mod", OPTIONS, f"Which one?\nA. one\nB. two{LETTER}"),
        (
            "mmbench_en_dev_llava_mod",
            OPTIONS | {"hint": "A hint."},
            f"A hint.\nWhich one?\nA. one\nB. two{LETTER}",
        ),
        (
            "mmbench_cn_dev_llava_mod",
            OPTIONS | {"hint": float("nan"), "question": "哪一个?", "C": None},
            "哪一个?\nA. one\nB. two\n请直接回答选项字母。",
        ),
    ],
)
def test_a_prompt_is_that_of_the_reference(name, doc, prompt):
    assert rendered(name, doc) == prompt


@pytest.mark.parametrize("name", ["textvqa_val", "mmbench_en_dev", "mmbench_cn_dev"])
def test_a_variant_differs_from_its_task_in_the_prompt_only(name):
    ours, theirs = task_config(f"{name}_llava_mod"), task_config(name)
    changed = {"task", "doc_to_text", "lmms_eval_specific_kwargs"}
    # Tags and the settings of other models.
    unused = {"tag", "model_specific_generation_kwargs", "metadata"}
    if name.startswith("mmbench"):
        for each in ours, theirs:
            [score] = [one for one in each["metric_list"] if one["metric"] == "gpt_eval_score"]
            score.pop("aggregation")  # ours asks no judge
    assert ours.keys() - changed == theirs.keys() - changed - unused
    assert all(ours[key] == theirs[key] for key in ours.keys() - changed)


def test_options_end_at_the_first_empty_one():
    settings = {"post_prompt": ""}
    for empty in ("nan", "NaN", "None", "", " ", None, float("nan")):
        doc = OPTIONS | {"B": empty}
        assert utils.mmbench_doc_to_text(doc, settings) == "Which one?\nA. one"


@pytest.mark.parametrize("path", sorted(tasks.FOLDER.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_functions_of_a_task_exist_and_its_name_is_that_of_its_file(path):
    found = config(path)
    assert found["task"] == path.stem
    names = [found[key] for key in ("doc_to_text", "doc_to_visual")]
    names += [found.get("process_docs"), *(each["aggregation"] for each in found["metric_list"])]
    for name in names:
        module, _, function = (name or "").rpartition(".")
        if module.startswith("moddistill."):
            assert callable(getattr(importlib.import_module(module), function))
