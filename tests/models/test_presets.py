import dataclasses

import pytest

from moddistill.config import MoeConfig
from moddistill.model_folder import parameter_counts
from moddistill.models.presets import CLIP_L_336, PRESETS, preset, with_vocabulary
from moddistill.models.upcycle import upcycle_config


def billions(count):
    return round(count / 1e9, 3)


def language_model(name):
    return dataclasses.replace(preset(name), vision=None)


@pytest.mark.parametrize(
    ("name", "dense", "total", "activated"),
    [
        ("qwen1.5-0.5b", 0.464, 0.775, 0.568),
        ("qwen1.5-1.8b", 1.837, 3.054, 2.243),
        ("qwen2-0.5b", 0.494, 0.965, 0.651),
        ("qwen2-1.5b", 1.544, 3.278, 2.122),
    ],
)
def test_students_have_the_parameters_of_the_paper(name, dense, total, activated):
    config = language_model(name)
    sparse = upcycle_config(config, MoeConfig(num_experts=4, top_k=2, placement="sparse"))
    assert [billions(x) for x in parameter_counts(config)] == [dense, dense]
    assert [billions(x) for x in parameter_counts(sparse)] == [total, activated]


@pytest.mark.parametrize(
    ("name", "published"), [("qwen1.5-4b", 3.95), ("qwen1.5-7b", 7.72), ("qwen2-7b", 7.62)]
)
def test_teachers_have_their_published_size(name, published):
    assert round(parameter_counts(language_model(name))[0] / 1e9, 2) == published


# 23 layers of attention, feed-forward and two norms; patches, class token, positions, norm.
TOWER = (
    23 * (4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
    + 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"),
    [("qwen1.5-0.5b", 2.10), ("qwen1.5-1.8b", 6.30), ("qwen2-0.5b", 1.72), ("qwen2-1.5b", 3.94)],
)
def test_tower_without_its_last_layer_and_projector_are_added(name, millions):
    added = parameter_counts(preset(name))[0] - parameter_counts(language_model(name))[0]
    assert round((added - TOWER) / 1e6, 2) == millions


def test_the_tower_of_the_paper_gives_576_patches():
    assert (CLIP_L_336.patches, CLIP_L_336.used_layers) == (576, 23)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_of_a_preset_fit_each_other(name):
    config = preset(name)
    decoder, tower = config.decoder, config.vision
    assert decoder.heads * decoder.head_dim == decoder.width
    assert decoder.heads % decoder.kv_heads == 0
    assert decoder.real_vocab <= decoder.vocab_size
    if tower is not None:
        assert tower.width % tower.heads == 0
        assert tower.image_size % tower.patch_size == 0


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'qwen2-0.5' is unknown; .*did you mean 'qwen2-0.5b'"):
        preset("qwen2-0.5")


def test_a_vocabulary_is_taken_from_the_tokenizer():
    config = with_vocabulary(preset("tiny"), 300, 299)
    assert (config.decoder.real_vocab, config.decoder.vocab_size) == (300, 320)
    assert config.image_token == 299
    assert with_vocabulary(preset("tiny"), 320, 319).decoder.real_vocab == 320


def test_a_tokenizer_with_more_ids_than_rows_is_refused():
    with pytest.raises(ValueError, match="tokenizer has 321 ids, the model's embedding 320 rows"):
        with_vocabulary(preset("tiny"), 321, 0)
