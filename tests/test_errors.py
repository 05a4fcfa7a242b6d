import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.errors import at_field, one_line
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


def test_text_on_one_line_is_escaped_and_bounded():
    assert one_line("a b\\é狗") == "a b\\é狗"
    assert one_line("a\nb\x1b[2J\u2028\ud800") == r"a\nb\x1b[2J\u2028\ud800"
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 197 + "..."
    assert one_line("\0" * 10**6) == (r"\x00" * 50)[:197] + "..."
