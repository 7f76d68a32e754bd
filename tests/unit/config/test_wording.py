from __future__ import annotations

import pytest

from tproxyd.config.wording import escaped, one_of, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1, "1"),
        (1.5, "1.5"),
        ("eth*", '"eth*"'),
        ("a\nb\x1b[31m", '"a\\nb\\x1b[31m"'),
        ("x" * 40, '"' + "x" * 40 + '"'),
        ("x" * 41, '"' + "x" * 37 + '..."'),
        ([1], "a list"),
        ((1,), "a list"),
        ({}, "a mapping"),
        (b"x", "a value of type bytes"),
    ],
)
def test_values_are_shown_short_and_on_one_line(value, text):
    assert shown(value) == text


def test_unprintable_characters_are_escaped():
    assert escaped("ä\r\n\udc80") == "ä\\r\\n\\udc80"


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")]
)
def test_names_are_listed_as_a_choice(names, text):
    assert one_of(names) == text


def test_a_long_choice_is_cut():
    assert one_of(str(n) for n in range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 or one of 2 more"
