import pytest

from moddistill.data.quarantine import Rejected
from moddistill.data.reasons import Reasons, kind


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("number of <image>: expected 2, one per image, got 1", "expected N, one per image"),
        ("'a.png' in b.zip: expected a plain file, got a link", "expected a plain file"),
        ("x: expected 1,234 bytes, got more", "expected N bytes"),
        ("row: expected tab-separated UTF-8 text, got x", "expected tab-separated UTF-8 text"),
        ("roles: expected 'user', got 'x'", "expected ..."),
        ("something else", "something else"),
    ],
)
def test_a_kind_is_what_was_expected_without_numbers_and_names(reason, expected):
    assert kind(reason) == expected


def test_the_commonest_kinds_have_their_number_and_first_example():
    reasons = Reasons()
    for line, number in enumerate((1, 2, 3), 1):
        reasons.add(Rejected("a.json", line, f"x: expected {number} bytes, got more"))
    reasons.add(Rejected("a.json", 4, "y: expected a file, got none"))
    assert reasons.commonest(1) == {
        "expected N bytes": {
            "count": 3,
            "example": "a.json, record 1: x: expected 1 bytes, got more",
        }
    }
    assert list(reasons.commonest(9)) == ["expected N bytes", "expected a file"]
