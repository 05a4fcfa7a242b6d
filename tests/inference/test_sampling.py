"""The choice of the next token, by hand and against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.inference.sampling import Sampling, choose_tokens

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


def frequencies(sampling, draws=4000):
    rows = jnp.tile(LOGITS, (draws, 1))
    rngs = jax.random.split(jax.random.key(0), draws)
    tokens = choose_tokens(rows, sampling, rngs)
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
        # The two most probable, of which 0.3 is less than 0.7 times 0.5.
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_k=2, min_p=0.7), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.2), [0.526, 0.316, 0.158, 0]),
        # Squared and renormalised by 0.365.
        (Sampling(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    ],
)
def test_sampling_follows_its_settings(sampling, expected):
    # Four standard deviations of 4,000 draws.
    np.testing.assert_allclose(frequencies(sampling), expected, atol=4 * 0.5 / 4000**0.5)
    assert not np.any(frequencies(sampling)[np.asarray(expected) == 0])


def test_penalised_tokens_are_those_of_the_row():
    logits = jnp.array([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    seen = jnp.array([[True, False, False], [False, False, False]])
    rngs = jax.random.split(jax.random.key(0), 2)
    tokens = choose_tokens(logits, Sampling(repetition_penalty=2.0), rngs, seen)
    np.testing.assert_array_equal(tokens, [1, 0])  # 2 / 2 < 1.5


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_samples_come_from_the_tokens_of_transformers(settings):
    """The tokens that are ever drawn are those that its processors leave."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    draws, size = 3000, 30
    logits = np.random.default_rng(1).normal(size=(1, size)).astype(np.float32) * 2
    prompt = np.array([[3, 7, 7, 11]])
    config = transformers.Qwen2Config(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    generation = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    processors = model._get_logits_processor(generation, input_ids_seq_length=4)
    expected = processors(torch.tensor(prompt), torch.tensor(logits)).softmax(-1).numpy()[0]

    seen = np.zeros((draws, size), bool)
    seen[:, prompt[0]] = True
    rngs = jax.random.split(jax.random.key(0), draws)
    rows = jnp.tile(jnp.asarray(logits), (draws, 1))
    tokens = choose_tokens(rows, Sampling(**settings), rngs, jnp.asarray(seen))
    found = np.bincount(np.asarray(tokens), minlength=size) / draws
    assert not np.any(found[expected == 0])
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / draws**0.5)


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
        ({"top_k": -1}, r"^top_k: expected >= 0, got -1"),
        ({"min_p": 1.5}, r"^min_p: expected >= 0 and <= 1, got 1\.5"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty: expected > 0 and <= 10000, got 0\.0"),
    ],
)
def test_invalid_sampling_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
