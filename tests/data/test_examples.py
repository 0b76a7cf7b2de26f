"""What all data sets share: the check of an example, names, and an end to endless skipping."""

import zlib

import pytest

from tokenflow_jax.data.examples import Broken, Guard, Skipped, check_example, is_heldout


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 3}, {"name": ""}, {"name": None}, {"label": "cat"}, {"label": 2**40},
        {"label": 1.5}, {"label": [1]}, {"label": True}, {"label": -2}, {"group": "x"},
        {"group": 10**400}, {"caption": 3}, {"caption": None}, {"caption": "half \ud83d"},
        {"captions": "text"}, {"captions": ["a", 1]}, {"tags": [1, 2]}, {"tags": {"a": 1}},
    ],
)  # fmt: skip
def test_wrong_values_are_broken_and_shown_briefly(wrong):
    with pytest.raises(Broken) as caught:
        check_example({"name": "x", **wrong})
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_right_values_pass():
    right = {"name": "caf\udce9.png", "label": -1, "group": 2**31 - 1, "captions": ["é"]}
    assert check_example(right) is right


@pytest.mark.parametrize("name", ["a.png", "é/1.png", "犬", "a\n"])
def test_ordinary_names_keep_their_split(name):
    assert is_heldout(name) == (zlib.crc32(name.encode()) % 10 == 0)


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\ud83d.png"])
def test_names_that_are_not_unicode_have_a_split(name):
    assert is_heldout(name) in (True, False)


def test_names_are_logged_escaped_and_cut(caplog):
    skipped = Skipped("data", 9)
    for name in ("a\nWARNING all is well", "b\x1b[2J", "caf\udce9.png", "c" * 100_000):
        skipped.add(name, Broken("damaged", "one\ntwo"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    for text in (*messages, skipped.note(), skipped.nothing_usable("picture")):
        assert text.isprintable() and len(text) < 1000
    assert r"skipped caf\udce9.png: damaged: one two" in messages[2]


@pytest.mark.parametrize("count", [1, 5])
def test_a_guard_gives_up_after_two_passes_without_a_success(count):
    skipped = Skipped("data", 40)
    skipped.add("x", Broken("gone", "for good"))
    guard = Guard(skipped, "picture")
    for _ in range(3):
        for _ in range(2 * 40 // count):
            guard.check(False, count)
        guard.check(True, count)
    with pytest.raises(ValueError, match=r"no usable picture among the 40.*'gone': 1.*x: gone: fo"):
        for _ in range(2 * 40 // count + 32):
            guard.check(False, count)


def test_a_guard_may_allow_fewer_failures_than_there_are_examples():
    guard = Guard(Skipped("data", 10**6), "conversation", most=64)
    for _ in range(100):
        guard.check(True)
        for _ in range(7):
            guard.check(False, 8)
    with pytest.raises(ValueError, match="no usable conversation among the 1000000"):
        guard.check(False, 8)
