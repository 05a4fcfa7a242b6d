"""Extractions by two processes, with the collectives of the CPU backend."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from moddistill.convert.exporting import export_model
from moddistill.models.presets import preset, with_vocabulary
from moddistill.storage.model_folder import save_model
from moddistill.teachers.cache import TeacherCache
from tests import torch_or_skip as torch
from tests.distributed.test_processes import by_flags

EXTRACT = """
import sys
from moddistill import extract
from moddistill.extraction import plan
from moddistill.teachers import cache

plan.SHARD_RECORDS = cache.SHARD_RECORDS = 3
extract.main(sys.argv[1:])
"""


def extracted(out, *flags, processes):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(8 // processes), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EXTRACT, "--config", "experiments/d2s.py:tiny"]
    command += ["--top_k", "8", "--out", str(out), "--config.dtype=float32", *flags]
    launches = by_flags(processes) if processes > 1 else [([], {})]
    running = [
        subprocess.Popen([*command, *where], env=env, stderr=subprocess.PIPE, text=True)
        for where, _ in launches
    ]
    for process in running:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    return TeacherCache(out)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "transformers"])
def test_two_processes_extract_like_one(init, tokenizer, tmp_path, small_shards, backend):
    flags = ["--backend", backend]
    if backend == "transformers":
        torch.load_module()
        config = with_vocabulary(preset("tiny-teacher"), tokenizer.real_ids, tokenizer.image_id)
        config = dataclasses.replace(config, template="vicuna")
        save_model(tmp_path / "model", config, init(config), tokenizer, {})
        export_model(tmp_path / "model", tmp_path / "hf", max_shard_size=10**9)
        flags.append(f"--config.teacher={tmp_path / 'hf'}")
    one, two = (extracted(tmp_path / str(count), *flags, processes=count) for count in (1, 2))
    assert one.settings == two.settings
    for number in range(8):
        x, y = (cache.entry("conversations", number).targets for cache in (one, two))
        np.testing.assert_array_equal(x.labels, y.labels)
        np.testing.assert_allclose(x.label_logprobs, y.label_logprobs, atol=1e-5)
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-3)
