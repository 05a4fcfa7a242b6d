"""Teachers in `transformers`: against the same weights here, of published classes, and bad ones."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from moddistill.config import CacheConfig, DataConfig, MeshConfig, SourceConfig
from moddistill.convert.exporting import export_model
from moddistill.errors import UserError
from moddistill.extraction.run import extract
from moddistill.extraction.transformers_tokens import ChatTokens
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.vocabulary import num_ids
from moddistill.storage.model_folder import save_model
from moddistill.teachers.cache import TeacherCache
from moddistill.training.loop import train
from tests import torch_or_skip

torch_or_skip.skip_module()
from moddistill.extraction import transformers_run, transformers_teacher  # noqa: E402  imports torch
from moddistill.extraction.transformers_teacher import TransformersTeacher  # noqa: E402

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
TALKS = [
    [("<image>\nwhat colour is it?", "a red circle")],
    [("hello", "hi there"), ("what is 2 + 2?", "4"), ("bye", "bye")],
    [("<image>\nand this <image>\nis what?", "two shapes, no circle"), ("sure?", "yes")],
    [("<image>\nis it a triangle?", "no")],
]


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

    def make(teacher, stage="d2s", rejected=0.0, **changes):
        name = "pairs.json" if stage == "preference" else "talks.json"
        source = SourceConfig(path=str(data / name), images=str(data))
        sources = DataConfig(
            sources={"talks": source}, max_length=512, max_images=2, max_rejected=rejected
        )
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
            if name == "ids" and x is not None:
                assert np.mean(x == y) > 0.95  # rounding may exchange two that are nearly equal
            elif x is not None:
                atol = 2e-3 if name == "logprobs" and kind == "top_k" else 1e-4
                np.testing.assert_allclose(y, x, atol=atol * (20 if kind == "preference" else 1))
    assert count == (2 if kind == "preference" else len(TALKS))
    assert here.settings.fingerprint == there.settings.fingerprint


def change_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def folder(teachers, tmp_path):
    """A copy of a teacher, to be changed."""
    return Path(shutil.copytree(teachers("chatml") / "hf", tmp_path / "hf"))


@pytest.mark.parametrize("fault", ["template", "weights", "folder"])
def test_folders_without_a_teacher_are_refused(folder, run_of, tmp_path, fault):
    if fault == "template":
        for name in ("chat_template.json", "chat_template.jinja"):
            (folder / name).unlink(missing_ok=True)
        for file in folder.glob("*config.json"):
            change_json(file, chat_template=None)
        expected = "expected a processor with a chat template, got none"
    elif fault == "weights":
        (folder / "model.safetensors").unlink()
        expected = "expected what AutoModelForImageTextToText of transformers loads, got"
    else:
        shutil.rmtree(folder)
        expected = r"model: expected an existing folder or a hub name .*, got '.*hf'"
    with pytest.raises(UserError, match=rf"config\.teacher: .*{expected}"):
        extract(run_of(folder), CacheConfig(ids=4), tmp_path / "cache", "transformers")


def test_a_model_whose_logits_are_capped_is_refused(folder, run_of, tmp_path, monkeypatch):
    class Capped(TransformersTeacher):
        def __init__(self, *args):
            super().__init__(*args)
            head = self._model.get_output_embeddings()
            head.register_forward_hook(lambda module, x, y: y.tanh() / 2 if x[0].ndim == 3 else y)

    monkeypatch.setattr(transformers_run, "TransformersTeacher", Capped)
    with pytest.raises(UserError, match="expected a model whose logits are a matmul of its last"):
        extract(run_of(folder), CacheConfig(ids=4), tmp_path / "cache", "transformers")


def reasons(cache):
    return [cache.entry("talks", number).reason for number in range(len(TALKS))]


def test_a_processor_that_drops_images_leaves_out_their_records(
    folder, run_of, tmp_path, monkeypatch
):
    def without_images(self, rows, make=TransformersTeacher._inputs):
        def plain(row):
            return row._replace(images=[], chat=row.chat._replace(text=no_image(row.chat.text)))

        return make(self, [plain(row) for row in rows])

    def no_image(text):
        return text.replace("<image>", "")

    monkeypatch.setattr(TransformersTeacher, "_inputs", without_images)
    extract(run_of(folder, rejected=1.0), CacheConfig(ids=4), tmp_path / "cache", "transformers")
    found = reasons(TeacherCache(tmp_path / "cache"))
    assert found[1] == ""
    assert all(each.startswith("processor: expected ") for each in (*found[:1], *found[2:]))


def test_a_processor_without_pixels_leaves_out_records_with_images(
    folder, run_of, tmp_path, monkeypatch
):
    """Their placeholders are among the tokens, and a model would take them for text."""

    def load(auto, folder, make=transformers_teacher._loaded, **settings):
        found = make(auto, folder, **settings)
        if auto is AutoProcessor:
            drop_pixels(found)
        return found

    def drop_pixels(processor):
        whole = type(processor).__call__

        def call(self, *args, **kwargs):
            found = whole(self, *args, **kwargs)
            found.pop("pixel_values", None)
            return found

        monkeypatch.setattr(type(processor), "__call__", call)

    monkeypatch.setattr(transformers_teacher, "_loaded", load)
    extract(run_of(folder, rejected=1.0), CacheConfig(ids=4), tmp_path / "cache", "transformers")
    found = reasons(TeacherCache(tmp_path / "cache"))
    assert found[1] == ""
    expected = "processor: expected pixel_values of images, got "
    assert all(each.startswith(expected) for each in (*found[:1], *found[2:]))


def test_a_record_that_the_model_refuses_is_the_only_one_left_out(
    folder, run_of, tmp_path, monkeypatch
):
    def refuse(self, inputs, run=TransformersTeacher._hidden):
        if len(inputs.get("pixel_values", ())) in (2, 4):  # all records together, or the third
            raise IndexError("features and tokens\ndo not match")
        return run(self, inputs)

    monkeypatch.setattr(TransformersTeacher, "_hidden", refuse)
    run = run_of(folder, rejected=0.25)
    extract(run, CacheConfig(ids=4), tmp_path / "cache", "transformers")
    found = reasons(TeacherCache(tmp_path / "cache"))
    assert found == ["", "", r"model: features and tokens\ndo not match", ""]


def test_a_pair_with_a_control_token_in_an_answer_is_the_only_one_left_out(
    folder, run_of, data, tmp_path
):
    pairs = json.loads((data / "pairs.json").read_text())
    pairs[0]["rejected"] = "a <|im_start|> b"
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    run = run_of(folder, "preference", rejected=0.5)
    [source] = run.data.sources.values()
    sources = {"talks": dataclasses.replace(source, path=str(tmp_path / "pairs.json"))}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=sources))
    extract(run, CacheConfig(), tmp_path / "cache", "transformers")
    first, second = (TeacherCache(tmp_path / "cache").entry("talks", n).reason for n in range(2))
    assert first.startswith("supervised tokens: expected text and ends of answers, got id ")
    assert second == ""


def test_a_record_that_the_processor_refuses_is_the_only_one_left_out(
    folder, run_of, tmp_path, monkeypatch
):
    def refuse(self, rows, make=TransformersTeacher._inputs):
        if any("hello" in row.chat.text for row in rows):
            raise ValueError("no greetings")
        return make(self, rows)

    monkeypatch.setattr(TransformersTeacher, "_inputs", refuse)
    run = run_of(folder, rejected=0.25)
    extract(run, CacheConfig(ids=4), tmp_path / "cache", "transformers")
    found = reasons(TeacherCache(tmp_path / "cache"))
    assert found == ["", "processor: no greetings", "", ""]
    assert "no greetings" in (tmp_path / "cache" / "quarantine.jsonl").read_text()
    with pytest.raises(UserError, match=r"at most 0.0% of 4 records .*, got 1: 1 x processor: no"):
        extract(run_of(folder), CacheConfig(ids=4), tmp_path / "other", "transformers")


def change_template(folder, change):
    [file] = folder.glob("chat_template.*")
    if file.suffix == ".jinja":
        file.write_text(change(file.read_text()))
    else:
        change_json(file, chat_template=change(json.loads(file.read_text())["chat_template"]))


def test_a_record_that_the_template_refuses_is_left_out(folder, run_of, tmp_path):
    refuses = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    change_template(folder, lambda text: refuses + text)
    run = run_of(folder, rejected=1.0)
    extract(run, CacheConfig(ids=4), tmp_path / "cache", "transformers")
    found = reasons(TeacherCache(tmp_path / "cache"))
    assert found == ["", *["chat template: one turn only"] * 2, ""]


def test_a_template_without_an_end_of_answers_is_refused(folder, run_of, tmp_path):
    change_template(folder, lambda text: text.replace("<|im_end|>", "."))
    with pytest.raises(UserError, match="a chat template with a control token after each answer"):
        extract(run_of(folder), CacheConfig(ids=4), tmp_path / "cache", "transformers")


def test_what_begins_a_text_is_not_added_twice(folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.bos_token = "<|im_start|>"
    tokens = ChatTokens(processor, "teacher")
    assert not tokens.adds_special_tokens("<|im_start|>user") and tokens.adds_special_tokens("user")
    processor.tokenizer.bos_token = None
    assert tokens.adds_special_tokens("<|im_start|>user")


def test_drawn_ids_depend_on_the_records_only(folder, run_of, tmp_path):
    drawn = []
    for rows in (8, 2):
        run = run_of(folder, batch_size=rows, mesh=MeshConfig(data=2, tensor=4))
        extract(run, CacheConfig("samples", 16), tmp_path / str(rows), "transformers")
        cache = TeacherCache(tmp_path / str(rows))
        drawn.append([cache.entry("talks", n).targets.ids for n in range(len(TALKS))])
    for x, y in zip(*drawn, strict=True):
        assert np.mean(x == y) > 0.95  # rounding may move a draw to the next id
    assert len({tuple(row) for x in drawn[0] for row in x.tolist()}) > 10


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_published_classes_teach(family, data, run_of, tmp_path):
    """Against all logits of their own; then a student of another vocabulary learns from them."""
    command = [sys.executable, "-m", "tests.extraction.published_teachers", family]
    arguments = [str(tmp_path / "made"), str(data / "talks.json"), str(data)]
    made = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    cache = TeacherCache(tmp_path / "made" / "cache")
    expected = json.loads((tmp_path / "made" / "expected.json").read_text())
    for number, tokens in enumerate(expected):
        found = cache.entry("talks", number)
        assert found.targets is not None, found.reason
        labels, ids, logprobs, rest = (np.array(each) for each in zip(*tokens, strict=True))
        np.testing.assert_allclose(found.targets.label_logprobs, labels, atol=1e-4)
        np.testing.assert_allclose(found.targets.log_rest, rest, atol=1e-4)
        assert np.mean(found.targets.ids == ids) > 0.95  # rounding may exchange two
        np.testing.assert_allclose(found.targets.logprobs, logprobs, atol=5e-3)  # of 16 bits
    run = dataclasses.replace(run_of(f"cache:{cache.folder}"), tokenizer=run_of("x").tokenizer)
    train(run, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kd"] > 0 for row in rows)
    assert not (tmp_path / "run" / "without_targets.jsonl").exists()
