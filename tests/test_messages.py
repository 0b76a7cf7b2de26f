"""What reaches errors and logs of values that a file holds."""

import pytest

from tokenflow_jax import messages

VALUES = {
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "number": 10**5000,
    "list": [[["a"] * 99] * 99] * 99,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_shown_value_is_short(value):
    assert 0 < len(messages.shown(value)) <= 200


def test_a_shown_value_has_no_control_characters():
    assert messages.shown("a\x1b[2J\nb\ud83d") == r"'a\x1b[2J\nb\ud83d'"


def test_a_list_that_unfolds_endlessly_is_shown_at_once():
    value = []
    for _ in range(200):
        value = [value, value]
    assert len(messages.shown(value)) <= 200


def test_long_lists_of_problems_are_cut():
    lines = messages.bullets(f"problem {i}" for i in range(500)).split("\n")
    assert len(lines) == 11 and lines[-1] == "  - and 490 more"


def test_lines_of_a_list_and_errors_of_libraries_are_short_and_printable():
    text = messages.bullets(["x" * 10**6, "a\x1b[2J\nb", "\ud800"])
    assert all(len(line) <= 160 for line in text.split("\n")) and len(text.split("\n")) == 3
    text += messages.one_line(ValueError("\x9b\n" * 10**6))
    assert messages.printable(text) == text and len(text) < 1000


@pytest.mark.parametrize("code", ["\x1b", "\x9b", "\x7f", "\r", "\b", "\u2028", "\u202e", "\ud800"])
def test_control_characters_are_escaped_for_a_terminal(code):
    text = messages.printable(f"a\tb\n{code}c")
    assert code not in text and text.startswith("a\tb\n\\") and text.endswith("c")
    text.encode("utf-8")


def test_letters_of_all_scripts_stay():
    assert messages.printable("Ångström 林檎 🍎 שלום") == "Ångström 林檎 🍎 שלום"


def test_plain_names():
    assert messages.plain("a/b c.png") == "a/b c.png"
    assert messages.plain("a\n\x1b[2J\ud83d") == r"a\n\x1b[2J\ud83d"
    assert len(messages.plain("x" * 10**6)) <= 200
