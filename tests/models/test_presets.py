import dataclasses

import pytest

from moddistill.config import ExpertConfig
from moddistill.distributed.sharding import unbox
from moddistill.models.flops import parameter_counts
from moddistill.models.presets import CLIP_L_336, PRESETS, preset, with_vocabulary
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vlm import abstract_params
from moddistill.params import flatten


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
    sparse = upcycle_config(config, ExpertConfig(num_experts=4, top_k=2, placement="sparse"))
    assert [billions(x) for x in parameter_counts(config)] == [dense, dense]
    assert [billions(x) for x in parameter_counts(sparse)] == [total, activated]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen1.5-4b", 3.950),
        ("qwen1.5-7b", 7.721),
        ("qwen2-7b", 7.616),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-7b", 7.616),
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.721),
        ("qwen3-8b", 8.191),
    ],
)
def test_models_have_their_published_size(name, published):
    assert billions(parameter_counts(language_model(name))[0]) == published


# 24 layers of attention, feed-forward and two norms; patches, class token, positions, two norms.
LAYER = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
TOWER = 24 * LAYER + 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 4 * 1024


@pytest.mark.parametrize(
    ("name", "millions"),
    [("qwen1.5-0.5b", 2.10), ("qwen1.5-1.8b", 6.30), ("qwen2-0.5b", 1.72), ("qwen2-1.5b", 3.94)],
)
def test_tower_and_projector_are_added_and_the_last_layer_is_never_activated(name, millions):
    total, activated = parameter_counts(preset(name))
    language = parameter_counts(language_model(name))[0]
    assert round((total - language - TOWER) / 1e6, 2) == millions
    assert total - activated == LAYER + 2 * 1024


@pytest.mark.parametrize(
    ("name", "tower_bytes", "gigabytes"),
    [
        ("llava-interleave-qwen-0.5b-hf", 2, 1.73),
        ("llava-interleave-qwen-7b-hf", 2, 4.98 + 4.92 + 4.95 + 1.43),
        ("long-llava-qwen2-7b", 4, 5.00 + 4.99 + 4.99 + 1.50),
    ],
)
def test_published_llavas_have_the_size_of_their_files(name, tower_bytes, gigabytes):
    """Two bytes a parameter, and four for the tower of long-llava."""
    flat = flatten(unbox(abstract_params(preset(name))))
    tower = sum(leaf.size for path, leaf in flat.items() if path.startswith("vision/"))
    total = parameter_counts(preset(name))[0]
    size = 2 * (total - tower) + tower_bytes * tower
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_interleave_images_are_729_patches_of_all_layers():
    for name in ("llava-interleave-qwen-0.5b-hf", "llava-interleave-qwen-7b-hf"):
        tower = preset(name).vision
        assert (tower.patches, tower.used_layers) == (27 * 27, 26)


@pytest.mark.parametrize(
    ("family", "ids"), [("qwen1.5", 151_646), ("qwen2", 151_646), ("qwen2.5", 151_665),
                        ("qwen3", 151_669)]
)  # fmt: skip
def test_an_image_is_the_first_id_after_those_of_the_published_tokenizer(family, ids):
    configs = [config for name, config in PRESETS.items() if name.split("-")[0] == family]
    assert configs
    assert {(config.decoder.real_ids, config.image_token_id) for config in configs} == {
        (((0, ids),), ids)
    }


def test_qwen3_has_norms_of_query_and_key_in_place_of_biases():
    for name, config in PRESETS.items():
        decoder = config.decoder
        new = name.startswith("qwen3-")
        assert (decoder.qk_norm, decoder.qkv_bias) == (new, not new)


@pytest.mark.parametrize("name", ["tiny", "tiny-teacher", "demo-teacher"])
def test_towers_of_tests_and_demo_compute_all_their_layers(name):
    tower = preset(name).vision
    assert tower.used_layers == tower.num_layers == (3 if name.startswith("demo") else 1)


def test_the_tower_of_the_paper_gives_576_patches():
    assert (CLIP_L_336.patches, CLIP_L_336.used_layers) == (576, 23)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_of_a_preset_fit_each_other(name):
    config = preset(name)
    decoder, tower = config.decoder, config.vision
    assert decoder.head_dim == (128 if decoder.qk_norm else decoder.hidden_size / decoder.num_heads)
    assert decoder.num_heads % decoder.num_kv_heads == 0
    assert decoder.real_ids[-1][1] <= decoder.vocab_size
    if tower is not None:
        assert tower.hidden_size % tower.num_heads == 0
        # Of SigLIP's 384 pixels the last 6 fill no patch.
        assert tower.image_size % tower.patch_size == (6 if tower.image_size == 384 else 0)


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"^preset: .*, got 'qwen2-0.5' .*did you mean 'qwen2-0.5b'"
    ):
        preset("qwen2-0.5")


def test_a_vocabulary_is_that_of_the_tokenizer():
    ids = ((0, 3), (4, 300))
    config = with_vocabulary(preset("tiny"), ids, 3)
    assert (config.decoder.real_ids, config.decoder.vocab_size) == (ids, 320)
    assert config.image_token_id == 3
    full = ((0, 320),)
    assert with_vocabulary(preset("tiny"), full, 320).decoder.real_ids == full


def test_a_tokenizer_with_more_ids_than_rows_is_refused():
    with pytest.raises(ValueError, match=r"^tokenizer: expected at most 320 ids, .*, got 321"):
        with_vocabulary(preset("tiny"), ((1, 321),), 0)
