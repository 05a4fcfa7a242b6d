import json
import logging
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moddistill.config import ExpertConfig
from moddistill.errors import at_field, invalid, not_one_of, one_line, printable
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


BOUNDED = settings(max_examples=100, derandomize=True, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def shown(value):
    return str(invalid("x", value, "y")).removeprefix("x: expected y, got ")


@BOUNDED
@given(JSON)
def test_a_short_value_is_shown_as_python_writes_it(value):
    if len(repr(value)) <= 200:
        assert shown(value) == repr(value)


@BOUNDED
@given(JSON)
def test_a_long_value_is_shown_up_to_200_characters(value):
    value = [value, "x" * 300]
    assert shown(value) == repr(value)[:197] + "..."


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 10**7, "'xxx"),
        (b"\0" * 10**7, r"b'\x00\x00"),
        ([0] * 10**6, "[0, 0, "),
        (dict.fromkeys(range(10**6)), "{0: None, 1: None, "),
        ({"a": ["x" * 10**7]}, "{'a': ['xxx"),
        ({"k" * 300: "x" * 10**7}, "{'kkk"),
        (nested(10**5), "[[[["),
    ],
    ids=["text", "bytes", "list", "object", "text inside", "long name", "nesting"],
)
def test_a_large_value_is_not_copied_to_show_its_start(value, start):
    tracemalloc.start()
    text = shown(value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes
    assert text.startswith(start)
    assert len(text) == 200
    assert text.endswith("...")


def test_control_characters_of_a_value_are_escaped():
    assert shown("a\n\x1b[2J\u202e\ud800") == r"'a\n\x1b[2J\u202e\ud800'"


def test_an_integer_that_python_refuses_to_write_is_shown_by_its_size():
    assert shown(10**5000) == "an integer of 16,610 bits"
    assert shown([10**5000]) == "[an integer of 16,610 bits]"


def test_text_for_a_terminal_has_no_control_characters():
    text = printable("a\n\t\x1b[2J\r\x7f\x9b\u202e\ud800é\u3000\U0001f600")
    assert text == "a\n\t\\u001b[2J\\u000d\\u007f\\u009b\\u202e\\ud800é\u3000\U0001f600"
    every = "".join(map(chr, range(0x3000)))
    assert json.loads(printable(json.dumps(every, ensure_ascii=False))) == every
    assert {each for each in printable(every) if unicodedata.category(each) == "Cc"} == {"\n", "\t"}


def test_messages_of_this_library_are_logged_without_control_characters(caplog):
    logging.getLogger("moddistill").warning("%s: %d", "a\x1b[2J", 3)
    assert caplog.messages == [r"a\u001b[2J: 3"]


def test_a_long_text_is_not_compared_with_the_choices():
    assert "did you mean 'dropless'" in str(not_one_of("x", "droples", ["dropless"]))
    long = "x" * 201  # the comparison takes seconds for a million characters
    assert "did you mean" not in str(not_one_of("x", long, [long + "x"]))


def test_text_on_one_line_is_escaped_and_bounded():
    assert one_line("a b\\é狗") == "a b\\é狗"
    assert one_line("a\nb\x1b[2J\u2028\ud800") == r"a\nb\x1b[2J\u2028\ud800"
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 197 + "..."
    assert one_line("\0" * 10**6) == (r"\x00" * 50)[:197] + "..."
