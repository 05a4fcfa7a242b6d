import pytest

from moddistill.config import RecipeConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.setting_names import _SYNONYMS, nearest_setting, unknown_setting

KNOWN = (
    "steps", "epochs", "batch_size", "data.max_length", "data.heldout.path", "data.sources.a.path",
    "optim.lr", "optim.eps", "mesh.fsdp", "mesh.tensor", "student",
)  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("learning_rate", "optim.lr"),  # another name
        ("optim.learning_rate", "optim.lr"),
        ("num_epochs", "epochs"),
        ("model_max_length", "data.max_length"),
        ("lr", "optim.lr"),  # another part
        ("optim.batch_size", "batch_size"),
        ("stepz", "steps"),  # another spelling
        ("mesh.fsp", "mesh.fsdp"),
        ("optm.lr", "optim.lr"),
        ("steps.x", "steps"),
        ("model", "student"),
        ("mesh.model", "mesh.tensor"),  # the name in its part
        ("mesh.tp", "mesh.tensor"),
        ("optm.learning_rate", "optim.lr"),  # there is no such part
        ("data_path", "data.sources.a.path"),
    ],
)
def test_the_nearest_setting_is_suggested(setting, nearest):
    assert nearest_setting(setting, KNOWN) == f" (did you mean {nearest!r}?)"


@pytest.mark.parametrize("setting", ["zebra", "optim.zebra", "mesh.max_steps", "optim.model"])
def test_nothing_is_suggested_for_a_name_that_is_unlike_any(setting):
    assert nearest_setting(setting, KNOWN) == ""


def test_suggestion_in_a_recipe_is_of_the_same_stage():
    known = ("stages.d2d.optim.lr", "stages.d2s.optim.lr")
    hint = nearest_setting("stages.d2s.learning_rate", known)
    assert hint == " (did you mean 'stages.d2s.optim.lr'?)"


def test_another_name_of_a_stage_stays_in_its_part():
    known = ("student", "stages.d2s.student", "stages.d2s.mesh.fsdp", "stages.d2s.mesh.tensor")
    assert "'stages.d2s.mesh.tensor'" in nearest_setting("stages.d2s.mesh.model", known)
    assert "'stages.d2s.student'" in nearest_setting("stages.d2s.model", known)


def test_without_a_suggestion_the_settings_of_the_part_are_listed():
    error = unknown_setting("config", "optim.zebra", KNOWN)
    assert str(error) == "config.optim.zebra is not a setting; expected one of lr, eps"


@pytest.mark.parametrize("name", _SYNONYMS)
def test_every_other_name_leads_to_a_setting_and_is_none_itself(name):
    stage = {"data": {"sources": {"a": {}}}}
    with pytest.raises(
        ValueError, match=rf"^config\.{name} is not .* \(did you mean '.*{_SYNONYMS[name]}'"
    ):
        from_config_dict(TrainConfig, stage | {name: 1})
    with pytest.raises(ValueError, match=rf"did you mean 'stages\.s\..*{_SYNONYMS[name]}'"):
        from_config_dict(RecipeConfig, {"stages": {"s": stage | {name: 1}}})
