"""Templates of the models that a stage begins with."""

import dataclasses

import pytest

from moddistill.storage.model_folder import save_model
from moddistill.training.architectures import resolve_models


@pytest.fixture
def trained_with(tiny_architecture, init, tokenizer, tmp_path):
    """`trained_with(template, preset)`: the folder of a model that was trained with a template."""

    def save(template, preset="tiny-teacher"):
        config = dataclasses.replace(tiny_architecture(preset), template=template)
        save_model(tmp_path / template, config, init(config), tokenizer, {})
        return str(tmp_path / template)

    return save


@pytest.mark.parametrize(("stage", "warned"), [("init", False), ("sft", False), ("d2d", True)])
def test_a_student_distilled_in_another_template_is_a_warning(
    stage, warned, tiny_config, trained_with, caplog
):
    config = tiny_config(stage, student=trained_with("chatml", "tiny"), tokenizer="")
    resolve_models(config)
    assert ("is 'vicuna', but the student" in caplog.text) == warned
