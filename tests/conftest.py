"""What tests share: eight simulated devices, the smallest configs and models, random batches."""

import collections
import dataclasses
import importlib
import importlib.metadata
import os
import platform
import tempfile

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from moddistill.config import ExpertConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.data.tokenizer import load_tokenizer
from moddistill.models.batch import padded_batch
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import Vlm, dummy_batch
from moddistill.storage.model_folder import save_model

os.environ["HF_HUB_OFFLINE"] = "1"
# Models are tiny, so compiling is nearly all the time tests take. Less optimisation makes it three
# times as fast, and the older emitters of fusions, which jax 0.10 still has, twice as fast again;
# later versions ignore that option.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
    ]
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter):
    """What the tests ran on, and a line for each reason for which some were skipped."""
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    names = ("jax", "flax", "orbax-checkpoint", "transformers", "torch")
    versions = [f"{name} {installed.get(name, 'not installed')}" for name in names]
    terminalreporter.write_line(", ".join([f"Python {platform.python_version()}", *versions]))
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = collections.Counter(report.longrepr[2] for report in skipped)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory):
    """Records of `:tiny` experiments stay in this run's folder, whatever else runs beside it."""
    before = tempfile.tempdir
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """A program that several tests compile, such as that of a resumed run, is compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of other modules' tests would fill gigabytes; the cache on disk still has them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(stage, **fields)`: the stage's smallest config; a dict changes a part's."""

    def make(stage, **changes):
        module = importlib.import_module(f"experiments.{stage}")
        config = from_config_dict(TrainConfig, module.get_config("tiny").to_dict())
        for name, value in changes.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(config, name), **value)
            config = dataclasses.replace(config, **{name: value})
        return config

    return make


@pytest.fixture(scope="session")
def tokenizer(tiny_config):
    """The small tokenizer of the `:tiny` experiments."""
    return load_tokenizer(tiny_config("sft").tokenizer)


@pytest.fixture(scope="session")
def tiny_architecture(tokenizer):
    """`tiny_architecture(preset, moe=None)`: a preset with the tokenizer's ids, sparse by `moe`."""

    def make(name="tiny", moe=None):
        config = with_vocabulary(preset(name), tokenizer.real_ids, tokenizer.image_id)
        return config if moe is None else upcycle_config(config, moe)

    return make


@pytest.fixture(scope="session")
def init():
    """`init(config, seed=0)`: new parameters of an architecture, as one nested dict."""

    def make(config, seed=0):
        return jax.jit(lambda rng: nn.unbox(Vlm(config).init(rng, dummy_batch(config)))["params"])(
            jax.random.key(seed)
        )

    return make


@pytest.fixture(scope="session")
def random_batch():
    """`random_batch(config, rows, length)`: images, padding behind, a supervised end of each row.

    Rows have different numbers of supervised tokens.
    """

    def make(config, rows, length, seed=0):
        rng = np.random.default_rng(seed)
        patches = config.vision.patches if config.vision else 0
        tokens = rng.integers(0, config.decoder.real_ids[-1][1], (rows, length), np.int32)
        tokens[:, 1 : 1 + patches] = config.image_token_id
        real = rng.integers(patches + 4, length + 1, (rows, 1))
        answers = rng.integers(1, 4, (rows, 1)) + (np.arange(rows) % 2)[:, None] * 2
        place = np.arange(length)[None]
        loss_mask = (place < real) & (place >= np.maximum(real - answers, patches + 1))
        batch = padded_batch(tokens, real[:, 0], loss_mask)
        if config.vision:
            size = config.vision.image_size
            images = rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8)
            batch = batch._replace(images=images)
        return batch

    return make


@pytest.fixture(scope="session")
def tiny_models(tiny_architecture, init, tokenizer, tmp_path_factory):
    """Folders of saved models: `dense`, `sparse` (routers that differ) and `teacher`."""
    folder = tmp_path_factory.mktemp("models")
    architectures = {
        "dense": tiny_architecture("tiny"),
        "sparse": tiny_architecture("tiny", ExpertConfig()),
        "teacher": tiny_architecture("tiny-teacher"),
    }
    for seed, (name, config) in enumerate(architectures.items()):
        save_model(folder / name, config, init(config, seed), tokenizer, {"made": "by a test"})
    return {name: folder / name for name in architectures}


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """`image(seed)`: the path of a small random image."""
    folder = tmp_path_factory.mktemp("images")

    def write(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        return str(folder / f"{seed}.png")

    return write
