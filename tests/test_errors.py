import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.errors import at_field
from moddistill.models.moe.layer import check_moe
from moddistill.storage.model_folder import read_model_config


def test_an_error_names_the_setting_that_it_is_about():
    with (
        pytest.raises(
            ValueError, match=r"^config\.student: expected a model folder, .* got 'runs/x' without"
        ),
        at_field("config.student"),
    ):
        read_model_config("runs/x")


def test_settings_and_stages_are_named_once():
    with (
        pytest.raises(
            ValueError,
            match=r"^stage 'd2d': config\.teacher: expected a model folder, .* got 'x' wi",
        ),
        at_field("stage 'd2d'"),
        at_field("config.data"),
        at_field("config.teacher"),
    ):
        read_model_config("x")


def test_the_name_is_continued_by_a_message_that_begins_with_its_last_part():
    with (
        pytest.raises(ValueError, match=r"^config\.moe\.top_k: expected 1 to .*, got 9"),
        at_field("config.moe"),
    ):
        check_moe(ExpertConfig(top_k=9))


def test_errors_of_libraries_stay_as_they_are():
    with pytest.raises(ValueError, match=r"^operands could not be broadcast"), at_field("config.x"):
        np.zeros(2) + np.zeros(3)
