"""Pairs with a published teacher, from hub names through d2d and d2s to an exported student."""

import dataclasses
import importlib
import math

import huggingface_hub
import jax
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionModel

from experiments import common
from moddistill.config import MeshConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.distributed import sharding
from moddistill.distributed.sharding import make_mesh
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.storage.model_folder import read_model_config
from moddistill.training.architectures import resolve_models
from moddistill.training.loop import train
from moddistill.training.metrics import read_metrics
from moddistill.training.streams import open_streams
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.convert import published
from tests.convert.greedy import answer_in_transformers
from tests.parity.convert import pixel_values

pytestmark = pytest.mark.slow

LR = 1e-3
REAL = 151_646  # ids of the tokenizer; rows after them are `<image>` and padding


@pytest.fixture(scope="module")
def hub(tmp_path_factory, qwen_tokenizer):
    """Resolves hub names to folders of small models, with a separate import cache.

    Runs are on one device, since each of eight would hold the full vocabulary.
    """
    root = tmp_path_factory.mktemp("hub")
    folders = {
        name: published.write(root / name, name, qwen_tokenizer, seed)
        for seed, name in enumerate(published.CONFIGS)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folders[name]))
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda _: mesh)
        yield folders


@pytest.fixture(scope="module")
def student_of(hub, tmp_path_factory, qwen_tokenizer):
    """Returns the first student of a pair: model folder and Hugging Face folder."""
    root = tmp_path_factory.mktemp("students")
    text = hf.Text(hidden_size=16, num_layers=4, rows=151_936)
    language = hf.save(text.model(), root / "qwen2-0.5b", qwen_tokenizer)
    tower = hf.random_model(CLIPVisionModel, hf.clip_config(image_size=28, patch_size=14))
    import_model(str(language), root / "model", vision=str(hf.save(tower, root / "clip")))
    export_model(root / "model", root / "hf", max_shard_size=10**9)
    interleave = common.PAIRS["interleave"].student
    return {
        "interleave": (interleave, hub[interleave]),
        # As `init` leaves it, but for what it trains.
        "long-llava": (str(root / "model"), root / "hf"),
    }


def stage_config(stage, pair, student):
    """The experiment of a pair with two steps of eight small records in float32."""
    values = importlib.import_module(f"experiments.{stage}").get_config(f"pair={pair}")
    config = from_config_dict(TrainConfig, values.to_dict())
    data = common.tiny_data()
    sources = common.source(f"{data}/conversations.json", str(data))
    return dataclasses.replace(
        config,
        student=student,
        steps=2,
        batch_size=8,
        log_every=1,
        remat="none",
        dtype="float32",
        data=dataclasses.replace(config.data, sources=sources, max_length=64, packing=False),
        optim=dataclasses.replace(config.optim, lr=LR, warmup_ratio=0.0),
        logits_chunk_size=32,
    )


@pytest.fixture(scope="module")
def run(student_of, tmp_path_factory):
    """`run(pair)`: workdirs and configs of d2d and of d2s after it, and exports of both."""
    done = {}

    def make(pair):
        if pair not in done:
            root = tmp_path_factory.mktemp(pair)
            student, found = student_of[pair][0], {}
            for stage in ("d2d", "d2s"):
                config = stage_config(stage, pair, student)
                train(config, root / stage)
                student = str(root / stage / "model")
                export_model(root / stage / "model", root / f"{stage}-hf", max_shard_size=10**7)
                found[stage] = config, root / stage, root / f"{stage}-hf"
            done[pair] = found
        return done[pair]

    return make


def in_torch(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def batches(config, workdir):
    """The run's batches, as its pipeline makes them, and the tower that reads their images."""
    mesh = sharding.make_mesh(config.mesh)
    stream = open_streams(config, resolve_models(config), mesh, workdir / "again").training
    return [next(stream) for _ in range(config.steps)], read_model_config(workdir / "model").vision


def log_probabilities(model, batch, vision):
    """Returns log-probabilities at supervised positions over valid ids: [tokens, REAL]."""
    output = model(
        input_ids=torch.tensor(batch.tokens).long(),
        attention_mask=torch.tensor(batch.segments).long(),
        pixel_values=pixel_values(batch.images[:, 0], vision),
    )
    supervised = torch.tensor(batch.loss_mask[:, 1:])
    return output.logits[:, :-1][supervised][:, :REAL].log_softmax(-1)


def mean_kl(teacher, student):
    """Mean over tokens of KL(teacher || student), in nats."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def cross_entropy(student, batch):
    labels = torch.tensor(batch.tokens[:, 1:][batch.loss_mask[:, 1:]]).long()
    return -student.gather(1, labels[:, None]).mean()


def measured(workdir, name):
    return [row[name] for row in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("pair", common.PAIRS)
def test_d2d_losses_equal_torch_with_adamw(pair, run, student_of, hub):
    config, workdir, _ = run(pair)["d2d"]
    teacher, student = in_torch(hub[config.teacher]), in_torch(student_of[pair][1])
    trained = [x for name, x in student.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, LR, betas=(0.9, 0.98), eps=1e-8, weight_decay=0)
    expected = []
    data, vision = batches(config, workdir)
    for batch in data:
        with torch.no_grad():
            target = log_probabilities(teacher, batch, vision)
        loss = mean_kl(target, log_probabilities(student, batch, vision))
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert expected[0] > 0.1
    assert measured(workdir, "kd") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pair", common.PAIRS)
def test_d2s_starts_with_the_losses_of_the_exported_dense_student(pair, run, hub):
    """Experts are copies, so the first step of d2s has the loss of the d2d student."""
    config, workdir, _ = run(pair)["d2s"]
    teacher, student = in_torch(hub[config.teacher]), in_torch(run(pair)["d2d"][2])
    data, vision = batches(config, workdir)
    with torch.no_grad():
        target, predicted = (
            log_probabilities(model, data[0], vision) for model in (teacher, student)
        )
    expected = mean_kl(target, predicted).item(), cross_entropy(predicted, data[0]).item()
    first, second = ((row["kd"], row["ce"]) for row in read_metrics(workdir / "metrics.jsonl"))
    assert first == pytest.approx(expected, abs=1e-4)
    assert all(map(math.isfinite, second)) and second != first


@pytest.mark.parametrize("pair", ["interleave", "long-llava"])
def test_exported_student_answers_in_transformers(
    pair, run, qwen_tokenizer, model_logits, torch_logits, random_inputs, tmp_path
):
    _, workdir, out = run(pair)["d2s"]
    exported = in_torch(out)
    text = exported.config.text_config
    assert (text.model_type, text.vocab_size) == ("qwen2_moe", qwen_tokenizer.image_id + 1)
    model, params = load(workdir / "model")
    tokens, images = random_inputs(model.config)
    logits = torch_logits(exported, tokens, images, model.config)
    assert logits.std() > 0.5
    valid = slice(qwen_tokenizer.real_ids[-1][1])
    found = model_logits(workdir / "model", tokens, images)
    np.testing.assert_allclose(found[..., valid], logits[..., valid], atol=1e-4)

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8))
    image.save(tmp_path / "a.png")
    question = Prompt("<image>\nwhat colour is it?", (str(tmp_path / "a.png"),))
    [mine] = answer(model, params, qwen_tokenizer, [question], Decoding(max_new_tokens=16))
    expected = answer_in_transformers(exported, out, image, "what colour is it?", 16)
    assert (mine.prompt_ids, mine.token_ids) == expected
