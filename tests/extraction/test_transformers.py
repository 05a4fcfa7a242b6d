"""A teacher in `transformers` against the same weights here, and what may go wrong with one."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from moddistill.config import CacheConfig, DataConfig, SourceConfig
from moddistill.convert.exporting import export_model
from moddistill.extraction.run import extract
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.vocabulary import num_ids
from moddistill.storage.model_folder import save_model
from moddistill.teachers.cache import TeacherCache
from tests import torch_or_skip as torch

TALKS = [
    [("<image>\nwhat colour is it?", "a red circle")],
    [("hello", "hi there"), ("what is 2 + 2?", "4"), ("bye", "bye")],
    [("<image>\nand this <image>\nis what?", "two shapes, no circle"), ("sure?", "yes")],
    [("<image>\nis it a triangle?", "no")],
]


@pytest.fixture(scope="module", autouse=True)
def _torch():
    torch.load_module()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with images of the size that both models read, so that none is resized."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for number, talk in enumerate(TALKS):
        images = [f"{number}-{i}.png" for i in range(sum(q.count("<image>") for q, _ in talk))]
        for name in images:
            Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(folder / name)
        turns = [
            {"from": who, "value": x} for q, a in talk for who, x in (("human", q), ("gpt", a))
        ]
        records.append({"conversations": turns, **({"image": images} if images else {})})
    (folder / "talks.json").write_text(json.dumps(records))
    pairs = [
        {"question": q, "chosen": a, "rejected": "an other answer", "image": f"{n}-0.png"}
        for n, ((q, a), *_) in enumerate(TALKS)
        if n in (0, 3)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture(scope="module")
def teachers(init, tokenizer, tmp_path_factory):
    """`teachers(template)`: a model folder, and its export."""
    made = {}

    def make(template):
        if template not in made:
            folder = tmp_path_factory.mktemp(template)
            config = with_vocabulary(preset("tiny-teacher"), tokenizer.real_ids, tokenizer.image_id)
            config = dataclasses.replace(config, template=template)
            save_model(folder / "model", config, init(config), tokenizer, {})
            export_model(folder / "model", folder / "hf", max_shard_size=10**9)
            made[template] = folder
        return made[template]

    return make


@pytest.fixture
def run_of(tiny_config, data):
    """`run_of(teacher, stage)`: a run on the records above, in float32."""

    def make(teacher, stage="d2s", **changes):
        name = "pairs.json" if stage == "preference" else "talks.json"
        source = SourceConfig(path=str(data / name), images=str(data))
        sources = DataConfig(sources={"talks": source}, max_length=512, max_images=2)
        return dataclasses.replace(
            tiny_config(stage), teacher=str(teacher), dtype="float32", data=sources, **changes
        )

    return make


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
@pytest.mark.parametrize("kind", ["top_k", "all", "preference"])
def test_a_cache_is_that_of_the_same_weights_here(
    teachers, run_of, tokenizer, tmp_path, template, kind
):
    folder = teachers(template)
    stage = "preference" if kind == "preference" else "d2s"
    wanted = CacheConfig(ids=num_ids(tokenizer.real_ids) if kind == "all" else 8)
    extract(run_of(folder / "model", stage), wanted, tmp_path / "here")
    extract(run_of(folder / "hf", stage), wanted, tmp_path / "there", "transformers")
    here, there = (TeacherCache(tmp_path / name) for name in ("here", "there"))
    count = here.settings.fingerprint.sources["talks"].records
    for number in range(count):
        expected, found = (each.entry("talks", number) for each in (here, there))
        assert found.targets is not None, found.reason
        assert found.digest == expected.digest
        for name, x, y in zip(found.targets._fields, expected.targets, found.targets, strict=True):
            assert (x is None) == (y is None)
            if x is not None and name != "ids":
                atol = 2e-3 if name == "logprobs" and kind == "top_k" else 1e-4
                np.testing.assert_allclose(y, x, atol=atol * (20 if kind == "preference" else 1))
    assert count == (2 if kind == "preference" else len(TALKS))
    assert here.settings.fingerprint == there.settings.fingerprint
