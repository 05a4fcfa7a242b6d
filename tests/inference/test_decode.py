import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moddistill import generate
from moddistill.convert.resolve import load
from moddistill.data.chat_template import render
from moddistill.errors import printable
from moddistill.inference.decode import Answer, _end_id, answer, decode
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.inference.sampling import Sampling, choose_token
from moddistill.models.vlm import Vlm

NEW = 6
GREEDY = Sampling()


@pytest.fixture(scope="module", params=["dense", "sparse"])
def model(request, tiny_models):
    return load(tiny_models[request.param])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """`image(seed)`: the path of a small random image."""
    folder = tmp_path_factory.mktemp("images")

    def write(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        return str(folder / f"{seed}.png")

    return write


@pytest.fixture(scope="module")
def prompts(image):
    return [
        Prompt("<image>\nwhat colour is it?", (image(0),)),
        Prompt("is it red?"),
        Prompt("<image>\nis it green, or is it rather blue?", (image(1),), (("hello", "yes"),)),
    ]


def decoded(model, batch, end_id=-1, sampling=GREEDY, seed=0):
    module, params = model
    options = {"max_new_tokens": NEW, "end_id": end_id, "sampling": sampling}
    return np.asarray(decode(module, params, batch, jax.random.key(seed), **options))


def decoded_without_cache(model, batch):
    """Greedy decoding that reads the sequence so far in every step."""
    module, params = model
    real = module.config.decoder.real_ids[-1][1]
    lengths = (batch.segments > 0).sum(axis=1)
    rows, length = batch.tokens.shape
    tokens = np.pad(batch.tokens, ((0, 0), (0, NEW)))
    positions = np.broadcast_to(np.arange(length + NEW, dtype=np.int32), tokens.shape)

    @jax.jit
    def logits(inputs):
        return Vlm.logits(module.apply({"params": params}, inputs))

    for step in range(NEW):
        segments = (positions < (lengths + step)[:, None]).astype(np.int32)
        inputs = batch._replace(tokens=tokens, segments=segments, positions=positions)
        last = np.asarray(logits(inputs))[np.arange(rows), lengths + step - 1, :real]
        tokens[np.arange(rows), lengths + step] = last.argmax(axis=-1)
    return np.stack([tokens[i, n : n + NEW] for i, n in enumerate(lengths)])


def test_tokens_with_and_without_cache_are_equal(model, prompts, tokenizer):
    batch = prompt_batch(prompts, model[0].config, tokenizer)
    np.testing.assert_array_equal(decoded(model, batch), decoded_without_cache(model, batch))


def test_images_are_padded_with_the_vision_encoders_mean(prompts, tiny_architecture, tokenizer):
    config = tiny_architecture()
    tower = dataclasses.replace(config.vision, mean=(0.0, 0.0, 0.0))
    black = dataclasses.replace(config, vision=tower)
    batch = prompt_batch(prompts[:1], black, tokenizer)
    np.testing.assert_array_equal(batch.images[0, 0, 0], np.zeros((28, 3)))  # 28 x 20 pixels
    assert prompt_batch(prompts[:1], config, tokenizer).images[0, 0, 0].min() > 90


def test_answer_does_not_depend_on_the_batch(model, prompts, tokenizer):
    """Each prompt by itself has less padding and may have no image slot."""
    together = decoded(model, prompt_batch(prompts, model[0].config, tokenizer))
    for row, prompt in zip(together, prompts, strict=True):
        [single] = decoded(model, prompt_batch([prompt], model[0].config, tokenizer))
        np.testing.assert_array_equal(single, row)


def test_answer_of_a_model_with_capacity_does_not_depend_on_the_batch(
    tiny_models, prompts, tokenizer
):
    """Copies of one prompt would compete for the same slots."""
    model, params = load(tiny_models["sparse"])
    moe = dataclasses.replace(model.config.decoder.moe, dispatch="capacity", capacity_factor=0.1)
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    model = model.clone(config=dataclasses.replace(model.config, decoder=decoder))
    [single] = answer(model, params, tokenizer, prompts[:1], max_new_tokens=NEW)
    for row in answer(model, params, tokenizer, prompts[:1] * 8, max_new_tokens=NEW):
        assert row.token_ids == single.token_ids


def test_the_plain_template_ends_answers_with_a_line_break(tiny_models, tokenizer):
    """`plain` stops at a line break, which training must show as a token of its own."""
    end = render("plain", [("<image>", "a dog.")])[-1]
    assert tokenizer.encode(end.text) == [_end_id("plain", tokenizer)]


def test_rows_are_filled_with_the_end_token(tiny_models, prompts, tokenizer):
    model = load(tiny_models["dense"])
    batch = prompt_batch(prompts, model[0].config, tokenizer)
    free = decoded(model, batch)
    end_id = int(free[0, 2])
    expected = free.copy()
    for row in expected:
        if end_id in row:
            row[row.tolist().index(end_id) :] = end_id
    np.testing.assert_array_equal(decoded(model, batch, end_id), expected)


def test_decode_compiles_once_per_shape(tiny_models, prompts, tokenizer):
    model = load(tiny_models["dense"])
    size = []
    for order in (prompts, prompts[::-1]):
        answer(*model, tokenizer, order, max_new_tokens=NEW)
        size.append(decode._cache_size())
    assert size[0] == size[1]


LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


def frequencies(sampling, draws=4000):
    rows = jnp.tile(LOGITS, (draws, 1))
    tokens = choose_token(rows, sampling, jax.random.key(0))
    return np.bincount(np.asarray(tokens), minlength=4) / draws


def test_greedy_decoding_chooses_the_most_probable_token():
    np.testing.assert_array_equal(frequencies(Sampling()), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_p=0.4), [1, 0, 0, 0]),
        # 0.5 does not reach 0.6; 0.5 and 0.3 do, and are 5 / 8 and 3 / 8 of it.
        (Sampling(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        # Squared and renormalised by 0.365.
        (Sampling(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    ],
)
def test_sampling_follows_temperature_and_top_p(sampling, expected):
    # Four standard deviations of 4,000 draws.
    np.testing.assert_allclose(frequencies(sampling), expected, atol=4 * 0.5 / 4000**0.5)
    assert not np.any(frequencies(sampling)[np.asarray(expected) == 0])


def test_sampling_follows_its_seed(tiny_models, prompts, tokenizer):
    model = load(tiny_models["dense"])
    batch = prompt_batch(prompts[:1], model[0].config, tokenizer)
    hot = Sampling(temperature=2.0)
    draws = [decoded(model, batch, sampling=hot, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"^temperature: expected >= 0, got -0\.1"),
        ({"temperature": float("nan")}, r"^temperature: expected >= 0, got nan"),
        # A quotient by it overflows, and the first token would always be chosen.
        ({"temperature": 1e-300}, r"^temperature: expected 0, or 0\.0001 to 10000, got 1e-300"),
        ({"temperature": float("inf")}, r"^temperature: expected 0, or 0\.0001 to 10000, got inf"),
        ({"top_p": 0.0}, r"^top_p: expected > 0 and <= 1, got 0\.0"),
        ({"top_p": 1.5}, r"^top_p: expected > 0 and <= 1, got 1\.5"),
    ],
)
def test_invalid_sampling_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def command(tiny_models, *args):
    folder = ["--model", str(tiny_models["dense"]), "--max_new_tokens", str(NEW)]
    generate.main([*folder, *args])


def test_generate_prints_one_json_object(tiny_models, image, prompts, tokenizer, capsys):
    command(tiny_models, "--prompt", "what colour is it?", "--image", image(0), "--json")
    printed = json.loads(capsys.readouterr().out)
    [expected] = answer(*load(tiny_models["dense"]), tokenizer, prompts[:1], max_new_tokens=NEW)
    assert printed == {
        "text": expected.text, "token_ids": expected.token_ids, "prompt_ids": expected.prompt_ids
    }  # fmt: skip
    # One image of 2 x 2 patches.
    assert printed["prompt_ids"].count(tokenizer.image_id) == 4
    assert tokenizer.decode(printed["token_ids"]).strip() == printed["text"]


def test_generate_prints_only_the_text(tiny_models, tokenizer, capsys):
    command(tiny_models, "--prompt", "is it red?")
    printed = capsys.readouterr().out
    [expected] = answer(
        *load(tiny_models["dense"]), tokenizer, [Prompt("is it red?")], max_new_tokens=NEW
    )
    assert printed == printable(expected.text) + "\n"


def test_control_characters_of_an_answer_are_escaped(tiny_models, capsys, monkeypatch):
    text = "a\x1b[2J\x07\x9b31m\tb\nc\u3000é"
    monkeypatch.setattr(generate, "answer", lambda *_, **__: [Answer(text, [1], [2])])
    command(tiny_models, "--prompt", "q")
    assert capsys.readouterr().out == "a\\u001b[2J\\u0007\\u009b31m\tb\nc\u3000é\n"
    command(tiny_models, "--prompt", "q", "--json")
    printed = capsys.readouterr().out
    assert printed.strip().isprintable() or "\u3000" in printed
    assert "\x9b" not in printed
    assert json.loads(printed)["text"] == text


def test_a_broken_image_ends_with_one_line(tiny_models, tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II*\0 and no image")
    args = ["--model", str(tiny_models["dense"]), "--prompt", "q", "--image", f"{tmp_path}/a.tiff"]
    with pytest.raises(SystemExit, match=r"^error: .*a\.tiff: expected a readable image"):
        generate.main(args)


def test_another_number_of_images_than_placeholders_is_an_error(tiny_models, image):
    with pytest.raises(SystemExit, match=r"number of <image>: expected 2, one per image, got 1"):
        command(tiny_models, "--prompt", "<image> what?", "--image", image(0), "--image", image(1))
    with pytest.raises(SystemExit, match=r"number of <image>: expected 0, one per image, got 1"):
        command(tiny_models, "--prompt", "<image> what?")
