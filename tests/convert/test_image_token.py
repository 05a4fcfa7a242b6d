"""`<image>` may have any id; every other token of the tokenizer is real, wherever it is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image
from transformers import AutoModelForImageTextToText

from moddistill.config import DistillationConfig, PreferenceConfig, RouterLossConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.data.tokenizer import Tokenizer
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import answer
from moddistill.inference.prompts import Prompt
from moddistill.losses.distillation import token_loss
from moddistill.losses.preference import preference_loss
from moddistill.models.batch import PreferenceBatch, padded_batch
from moddistill.models.vlm import Vlm
from moddistill.params import flatten
from moddistill.teachers.live import LiveTeacher
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf
from tests.convert.greedy import answer_in_transformers

POSITIONS = ("third", "middle", "last, words after it")


def with_image_at(tokenizer, position):
    """The tokenizer with `<image>` at another id, and two more words."""
    fields = json.loads(tokenizer.backend.to_str())
    tokens = fields["model"]["vocab"] | {x["content"]: x["id"] for x in fields["added_tokens"]}
    ordered = sorted(tokens.keys() - {"<image>"}, key=tokens.get)
    words = ["<circle>", "<square>"]
    index = {"third": 3, "middle": 150}.get(position, len(ordered))
    ordered = [*ordered[:index], "<image>", *ordered[index:], *words]
    fields["model"]["vocab"] = {token: i for i, token in enumerate(ordered)}
    like = dict(fields["added_tokens"][0])
    fields["added_tokens"] = [
        {**like, "content": token, "id": i, "special": token not in words}
        for i, token in enumerate(ordered)
        if token in words or token in {x["content"] for x in fields["added_tokens"]}
    ]
    made = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(fields)))
    assert made.image_id == index
    return made


@pytest.fixture(scope="module", params=POSITIONS)
def models(request, small_tokenizer, tmp_path_factory):
    """A student and a teacher: torch models, model folders and their tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = with_image_at(small_tokenizer, request.param)
    made = []
    for name, text in {
        "student": hf.Text(num_layers=2, tied=False),
        "teacher": hf.Text(hidden_size=40, num_heads=5, num_kv_heads=5, num_layers=2, tied=False),
    }.items():
        model = hf.llava(text.config(), hf.clip_config(), tokenizer.image_id)
        source = hf.save(model, root / f"hf-{name}", tokenizer)
        import_model(str(source), root / name, template="chatml")
        made.append((model, root / name))
    return *made, tokenizer


def random_batch(config, tokenizer, seed):
    """Two rows with an image, all ids equally likely in their supervised end."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(tokenizer.real_ids[-1][1]), [tokenizer.image_id])
    tokens = rng.choice(words, (2, 20)).astype(np.int32)
    tokens[:, 1:5] = tokenizer.image_id
    loss_mask = np.broadcast_to(np.arange(20) >= 8, tokens.shape)
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 12, 12, 3), np.uint8)
    return padded_batch(tokens, np.array([20, 20]), loss_mask, images)


def test_loss_equals_torch_cross_entropy_over_valid_tokens(models, torch_logits):
    (student, student_folder), (teacher, teacher_folder), tokenizer = models
    student_model, params = load(student_folder)
    teacher_model, teacher_params = load(teacher_folder)
    batch = random_batch(student_model.config, tokenizer, 0)
    words = np.setdiff1d(np.arange(tokenizer.real_ids[-1][1]), [tokenizer.image_id])

    def log_probabilities(model, side):
        logits = torch_logits(model, side.tokens, side.images, student_model.config)
        return torch.tensor(logits[:, :-1, words]).log_softmax(-1)

    mask = torch.tensor(batch.loss_mask[:, 1:])
    labels = np.searchsorted(words, batch.tokens[:, 1:])
    logp, target = (log_probabilities(model, batch) for model in (student, teacher))
    expected = {
        "kd": (target.exp() * (target - logp)).sum(-1)[mask].mean(),
        "ce": -logp.gather(-1, torch.tensor(labels)[..., None])[..., 0][mask].mean(),
    }
    configs = DistillationConfig(), RouterLossConfig()
    loss = token_loss(
        student_model, LiveTeacher(teacher_model), *configs, terms=("kd", "ce"), chunk_size=256
    )
    arguments = (flatten(params), {}, teacher_params, jax.tree.map(jnp.asarray, batch))
    value, metrics = jax.jit(loss.__call__)(*arguments, jax.random.key(0))
    for name, mean in expected.items():
        np.testing.assert_allclose(metrics[name][0] / metrics[name][1], mean, rtol=1e-4)
    np.testing.assert_allclose(value, sum(expected.values()), rtol=1e-4)


def test_preference_loss_equals_torch_over_valid_tokens(models, torch_logits):
    (student, student_folder), (teacher, teacher_folder), tokenizer = models
    student_model, params = load(student_folder)
    teacher_model, teacher_params = load(teacher_folder)
    sides = [random_batch(student_model.config, tokenizer, seed) for seed in range(2)]
    words = np.setdiff1d(np.arange(tokenizer.real_ids[-1][1]), [tokenizer.image_id])

    def log_likelihood(model, side):
        logits = torch_logits(model, side.tokens, side.images, student_model.config)
        logp = torch.tensor(logits[:, :-1, words]).log_softmax(-1)
        labels = torch.tensor(np.searchsorted(words, side.tokens[:, 1:]))
        chosen = logp.gather(-1, labels[..., None])[..., 0]
        return (chosen * torch.tensor(side.loss_mask[:, 1:])).sum(-1)

    chosen, rejected = (
        log_likelihood(student, side) - log_likelihood(teacher, side) for side in sides
    )
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    batch = PreferenceBatch(*(side._replace(images=None) for side in sides), sides[0].images)
    configs = PreferenceConfig(kind="sigmoid"), RouterLossConfig()
    loss = preference_loss(student_model, LiveTeacher(teacher_model), *configs, chunk_size=256)
    arguments = (flatten(params), {}, teacher_params, jax.tree.map(jnp.asarray, batch))
    value, _ = jax.jit(loss.__call__)(*arguments, jax.random.key(0))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_export_has_the_same_logits_and_answers(models, model_logits, torch_logits, tmp_path):
    (_, folder), _, tokenizer = models
    export_model(folder, tmp_path / "out", max_shard_size=10**9)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    student_model, params = load(folder)
    batch = random_batch(student_model.config, tokenizer, 0)
    words = np.setdiff1d(np.arange(tokenizer.real_ids[-1][1]), [tokenizer.image_id])
    np.testing.assert_allclose(
        model_logits(folder, batch.tokens, batch.images)[..., words],
        torch_logits(model, batch.tokens, batch.images, student_model.config)[..., words],
        atol=1e-4,
    )
    assert model.generation_config.suppress_tokens == [tokenizer.image_id]

    image = Image.fromarray(batch.images[0, 0])
    image.save(tmp_path / "image.png")
    question = "what colour is the <circle>?"
    prompt = Prompt(f"<image>\n{question}", (str(tmp_path / "image.png"),))
    [mine] = answer(student_model, params, tokenizer, [prompt], Decoding(max_new_tokens=24))
    expected = answer_in_transformers(model, tmp_path / "out", image, question, 24)
    assert (mine.prompt_ids, mine.token_ids) == expected
    assert tokenizer.special("<circle>") in mine.prompt_ids
    assert len(set(mine.token_ids)) > 3


def test_image_token_is_never_generated(models):
    """All rows of the head are equal, so the most likely token is the first valid one."""
    (_, folder), _, tokenizer = models
    model, params = load(folder)
    params["decoder"]["head"] = jnp.ones_like(params["decoder"]["head"])
    prompt = Prompt("is it red?")
    for real_ids, expected in (
        (tokenizer.real_ids, 0),
        (((tokenizer.image_id + 1, tokenizer.real_ids[-1][1]),), tokenizer.image_id + 1),
    ):
        decoder = dataclasses.replace(model.config.decoder, real_ids=real_ids)
        changed = Vlm(dataclasses.replace(model.config, decoder=decoder))
        [reply] = answer(changed, params, tokenizer, [prompt], Decoding(max_new_tokens=2))
        assert reply.token_ids == [expected] * 2


def test_embedding_without_a_row_for_the_image_token_is_padded(
    small_tokenizer, tmp_path, torch_logits
):
    """The new rows are zero and masked; the other logits equal those of the source."""
    rows = small_tokenizer.image_id
    language = hf.Text(num_layers=1, tied=False, rows=rows).model()
    source = hf.save(language, tmp_path / "hf", small_tokenizer)
    tower = hf.save(hf.clip_tower(), tmp_path / "tower")
    config = import_model(str(source), tmp_path / "model", vision=str(tower))
    assert (config.decoder.vocab_size, config.decoder.real_ids) == (320, ((0, rows),))
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=10**9, vocabulary="padded")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    tokens = np.random.default_rng(0).integers(0, rows, (2, 9))
    found = torch_logits(model, tokens)
    np.testing.assert_allclose(found[..., :rows], torch_logits(language, tokens), atol=1e-5)
    assert not np.any(found[..., rows:])
    assert import_model(str(source), tmp_path / "text").decoder.vocab_size == rows
