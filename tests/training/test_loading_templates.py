"""Templates of the models that a stage begins with."""

import dataclasses

import pytest

from moddistill.convert.resolve import resolve
from moddistill.storage.model_folder import save_model
from moddistill.teachers import live
from moddistill.training.architectures import resolve_models


@pytest.fixture
def trained_with(tiny_architecture, init, tokenizer, tmp_path):
    """`trained_with(template, preset)`: the folder of a model that was trained with a template."""

    def save(template, preset="tiny-teacher"):
        config = dataclasses.replace(tiny_architecture(preset), template=template)
        save_model(tmp_path / template, config, init(config), tokenizer, {})
        return str(tmp_path / template)

    return save


def test_teacher_of_another_template_is_refused(
    tiny_config, tiny_architecture, tokenizer, trained_with
):
    config = tiny_config("d2d", teacher=trained_with("chatml"))
    student = tiny_architecture()
    message = (
        rf"^config\.data\.template: expected 'chatml', the template of the teacher "
        rf"'{config.teacher}' \(or the teacher imported with --template vicuna\), got 'vicuna'$"
    )
    with pytest.raises(ValueError, match=message):
        live.teacher_architecture(config, resolve(config.teacher), student, tokenizer)
    data = dataclasses.replace(config.data, template="chatml")
    same = dataclasses.replace(config, data=data)
    assert (
        live.teacher_architecture(same, resolve(same.teacher), student, tokenizer).template
        == "chatml"
    )


def test_teacher_with_new_weights_fits_any_template(tiny_config, tiny_architecture, tokenizer):
    config = tiny_config("d2d", teacher="random:tiny-teacher", data={"template": "chatml"})
    teacher = resolve(config.teacher, tokenizer)
    live.teacher_architecture(config, teacher, tiny_architecture(), tokenizer)


@pytest.mark.parametrize(("stage", "warned"), [("init", False), ("sft", False), ("d2d", True)])
def test_a_student_distilled_in_another_template_is_a_warning(
    stage, warned, tiny_config, trained_with, caplog
):
    config = tiny_config(stage, student=trained_with("chatml", "tiny"), tokenizer="")
    resolve_models(config)
    assert ("is 'vicuna', but the student" in caplog.text) == warned
