"""Hostile files are one UserError that names file or field, in bounded time and memory.

`python -m pytest tests/convert/test_hostile.py`
"""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoConfig

from moddistill.errors import UserError
from moddistill.storage.digests import NAME, write_digests
from tests.convert import hostile, hostile_tokenizers, hostile_weights
from tests.convert.hostile_folders import make_folders, readers

SECONDS = 5
SHARE = 0.12  # fraction of the table of fields and values that is tested
GIB = 2**30


def all_cases():
    rng = random.Random(12)
    return [
        *hostile.config_cases(rng, SHARE),
        *hostile.model_cases(rng, SHARE),
        *hostile.other_json_cases(rng, SHARE),
        *hostile.file_cases(),
        *hostile_weights.header_cases(),
        *hostile_weights.pickle_cases(),
        *hostile_weights.archive_cases(),
        *hostile_weights.number_cases(),
        *hostile_weights.dtype_cases(),
        *hostile_weights.array_cases(rng),
    ]


CASES = all_cases()
# Cases without an effect, or with a valid meaning.
HARMLESS = (
    "import llava: config.json: vision_feature_layer is minus one",
    "with tower original: config.json: mm_vision_select_feature is null",
    "export model: model.json: architecture.vision.pre_norm is true",  # its value already
    "inspect model: model.json: architecture.decoder.moe.moe_intermediate_size is zero",  # default
    "inspect model: model.json: architecture.decoder.moe.norm_topk_prob is null",  # the default
    "tokenizer language: tokenizer.json: model.end_of_word_suffix is null",  # its value already
    "import llava: preprocessor_config.json is missing",
    "import language: generation_config.json is missing",
    "tokenizer vocabulary: merges.txt is empty",
    "inspect original: pytorch_model.bin is not UTF-8",  # archives are read from their end
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Intact folders; imports and traces once, so that no case is charged for it."""
    root = tmp_path_factory.mktemp("hostile")
    make_folders(root)
    for kind in ("qwen2", "qwen2_moe", "llava", "clip_vision_model"):
        AutoConfig.for_model(kind)
    return root


@pytest.fixture
def corrupted(root, tmp_path):
    """Returns a function for the folder of a case and its reader."""

    def make(case):
        folder = shutil.copytree(root / case.base, tmp_path / case.base)
        case.corrupt(folder)
        # The subject is not that a file has changed.
        plain = all(path.is_file() or path.is_dir() for path in folder.rglob("*"))
        if plain and (folder / NAME).is_file():
            write_digests(folder, "train")
        elif case.base != "model":  # a model folder without digests is refused
            (folder / NAME).unlink(missing_ok=True)
        return folder, readers(root, tmp_path / "out")[case.reader]

    return make


@pytest.fixture
def limited():
    """Limits wall time, CPU time and memory of a test."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)  # other tests run in parallel
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < GIB


def check_worded(message):
    """One line, or a line and an indented list; not long; naming a file or a field."""
    first, *rest = message.splitlines()
    assert all(line.startswith("  ") for line in rest)
    assert len(first) < 1000 and len(message) < 60_000
    assert re.search(r"/\w|config|model\.json|vision\.|moe\.", first), first


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_hostile_file_is_a_user_error(case, corrupted, limited):
    folder, read = corrupted(case)
    try:
        result = read(folder)
    except ValueError as error:
        assert isinstance(error, UserError), repr(error)
        check_worded(str(error))
        assert case.name not in HARMLESS
        return
    # `inspect` reports errors in its output.
    refused = isinstance(result, dict) and (
        result.get("not imported") or result.get("not exported")
    )
    assert refused or case.name in HARMLESS, "was read without an error"


def test_there_are_more_than_500_cases_and_few_are_harmless():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) > 500
    assert set(HARMLESS) <= set(names)
    assert len(HARMLESS) < 25


@pytest.mark.slow
def test_files_that_would_exhaust_memory_are_refused(tmp_path):
    """Measured in a separate process, relative to its peak memory with intact folders."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.hostile_bombs", str(tmp_path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 30
    wording = {name: part for name, (*_, part) in hostile_tokenizers.FIELDS.items()}
    for result in results:
        assert result["error"], result["name"]
        check_worded(result["error"])
        assert wording.get(result["name"], "") in result["error"]
        assert result["seconds"] < SECONDS, result
        assert result["bytes"] < GIB, result
