"""Recipes whose stages train from caches of their teachers."""

import dataclasses
import shutil

import pytest

from experiments import llava_mod
from moddistill import recipe
from moddistill.config import CacheConfig, RecipeConfig
from moddistill.configdict import from_config_dict
from moddistill.errors import UserError
from moddistill.training import loop
from moddistill.training.stages import stage_of


@pytest.mark.slow
def test_stages_with_a_cache_train_without_their_teacher(tiny_config, tmp_path, monkeypatch):
    stages = {"d2s": tiny_config("d2s"), "preference": tiny_config("preference")}
    caches = {name: CacheConfig(ids=4) for name in stages}
    config = RecipeConfig(order=tuple(stages), stages=stages, caches=caches)
    made = []

    def train(config, workdir):
        made.append(config.teacher)
        return loop.train(config, workdir)

    monkeypatch.setattr(recipe, "train", train)
    recipe.run(config, tmp_path)
    folders = [tmp_path / "caches" / name for name in stages]
    assert made == [f"cache:{folder}" for folder in folders]
    assert all((folder / "digests.json").is_file() for folder in folders)
    assert all((tmp_path / name / "model" / "model.json").is_file() for name in stages)
    shutil.rmtree(tmp_path / "caches")  # a finished recipe needs them no more
    recipe.run(config, tmp_path)
    assert not (tmp_path / "caches").exists()


def test_the_demo_from_caches_is_the_demo_with_caches_of_two_stages():
    demo, cached = (
        from_config_dict(RecipeConfig, llava_mod.get_config(name).to_dict())
        for name in ("demo", "demo,cached")
    )
    assert cached == dataclasses.replace(demo, caches=cached.caches)
    assert cached.caches == {name: CacheConfig("top_k", 16) for name in ("d2s", "preference")}
    assert all(stage_of(cached.stages[name]).teacher for name in cached.caches)


@pytest.mark.parametrize(
    ("stage", "changes", "cache", "message"),
    [
        ("sft", {}, {}, r"config\.caches: expected stages of .* with a teacher"),
        ("d2s", {"teacher": "cache:x"}, {}, r"config\.stages\.d2s\.teacher: expected a model, "),
        ("d2s", {}, {"ids": 0}, r"config\.caches\.d2s\.ids: expected >= 1 .*, got 0"),
    ],
)
def test_caches_that_cannot_be_made_stop_the_recipe_first(
    stage, changes, cache, message, tiny_config, tmp_path
):
    stages, caches = {stage: tiny_config(stage, **changes)}, {stage: CacheConfig(**cache)}
    config = RecipeConfig(order=(stage,), stages=stages, caches=caches)
    with pytest.raises(UserError, match=message):
        recipe.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
