"""Lines of text files: places, splits, the index of large files, JSON objects."""

import json
import time

import numpy as np
import pytest

from tokenflow_jax.data import jsonl
from tokenflow_jax.data.examples import Broken, is_heldout
from tokenflow_jax.data.jsonl import Described, Lines


def describe(line):
    return Described(-len(line), line.decode().strip())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f"Zeile {i} ü\n" + "\n" * (i % 2) for i in range(120)) + "ende")
    return path


def test_places_numbers_and_splits(file):
    found = Lines(file, "test", describe)
    assert len(found) == 121
    assert found.read(2) == "Zeile 2 ü".encode() and found.read(120) == b"ende"
    assert found.numbers[:3].tolist() == [1, 2, 4] and found.lengths[0] == -len("Zeile 0 ü\n") - 1
    held_out = [found.read(i).decode() for i in found.split("heldout")]
    assert held_out and all(map(is_heldout, held_out))
    both = [*found.split("heldout"), *found.split("train")]
    assert sorted(both) == found.split("all").tolist() == list(range(121))
    assert not list(file.parent.glob("*.npz")), "small files leave nothing behind"


def test_few_lines_are_not_split(tmp_path, caplog):
    (tmp_path / "few").write_text("a\nb\n")
    found = Lines(tmp_path / "few", "test", describe)
    assert found.split("heldout").tolist() == found.split("train").tolist() == [0, 1]
    assert "figures are on training data" in caplog.text


def test_long_lines_are_read_whole(tmp_path):
    (tmp_path / "long").write_bytes(b"x" * 10_000 + b"\ny")
    found = Lines(tmp_path / "long", "test", describe)
    assert [found.read(0), found.read(1)] == [b"x" * 10_000, b"y"]


def test_the_index_of_a_large_file_is_kept(file, monkeypatch, caplog):
    monkeypatch.setattr(jsonl, "_KEEP_FROM", 100)

    def never(line):
        raise AssertionError("went through the file again")

    first = Lines(file, "test", describe)
    again = Lines(file, "test", never)
    for name in ("offsets", "numbers", "lengths", "held_out"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype and (one == other).all(), name
    assert again.read(77) == first.read(77)
    with pytest.raises(AssertionError, match="again"):
        Lines(file, "another kind", never)
    file.write_text(file.read_text() + "\nmehr")
    changed = Lines(file, "test", describe)
    assert len(changed) == 122 and changed.read(121) == b"mehr"
    kept = file.with_name("some.jsonl.index.npz")
    kept.write_bytes(kept.read_bytes()[:-300])
    assert len(Lines(file, "test", describe)) == 122 and "made again" in caplog.text
    assert len(Lines(file, "test", never)) == 122
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, kept.name]


def test_an_index_that_cannot_be_written(file, monkeypatch, caplog, tmp_path_factory):
    """It is kept in the cache folder, or nowhere."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(jsonl, "_KEEP_FROM", 100)
    (file.parent / "some.jsonl.index.npz").mkdir()
    assert len(Lines(file, "test", describe)) == 121 and not caplog.text
    assert len(Lines(file, "test", None)) == 121, "went through the file again"
    (kept,) = (cache / "tokenflow_jax").iterdir()
    kept.unlink()
    kept.mkdir()
    assert len(Lines(file, "test", describe)) == 121
    assert "cannot be written" in caplog.text and "again" in caplog.text
    assert len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ', "invalid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON"),  # Python refuses such numbers
        (b'["a"]', "no object"),
    ],
)
def test_a_line_must_be_an_object(line, reason):
    with pytest.raises(Broken) as caught:
        jsonl.parse_object(line)
    assert caught.value.reason == reason


ROWS = [{"a": 'x"]}', "b": [1, {"c": "\\"}]}, {"a": "Ä, [\u2028\x85"}, {}, {"a": "y" * 300}]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("block", [97, 2**20])
def test_the_elements_of_an_array_are_its_lines(tmp_path, monkeypatch, indent, block):
    monkeypatch.setattr(jsonl, "_BLOCK", block)
    for ascii_only in (True, False):
        text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only)
        (tmp_path / "array.json").write_bytes(b"\xef\xbb\xbf \n" + text.encode() + b"\n")
        found = Lines(tmp_path / "array.json", "test", lambda line: Described(len(line)))
        assert [jsonl.parse_object(found.read(i)) for i in range(len(found))] == ROWS
        assert (found.numbers.tolist(), found.unit) == ([1, 2, 3, 4], "element")


def test_damaged_arrays_are_damaged_lines(tmp_path):
    cases = {
        '[{"a": 1}, 2, {"b": ': ['{"a": 1}', "2", ' {"b": '],  # cut
        '[{"a": 1}]\n[{"b": 2}]\n{"c": 3}\n': ['{"a": 1}', '[{"b": 2}]', '{"c": 3}'],
        '["a"]\n{"b": 1}\n': ['["a"]', '{"b": 1}'],
        '[{"a": 1}, , {"b": 2}]': ['{"a": 1}', '{"b": 2}'],
        "[]": ["[]"],
    }
    for text, expected in cases.items():
        (tmp_path / "x").write_text(text)
        found = Lines(tmp_path / "x", "test", describe)
        assert [found.read(i).decode() for i in range(len(found))] == expected, text


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "x").write_bytes("a\u2028b\x85c\x1cd\x0ce\rf\r\ng".encode())
    found = Lines(tmp_path / "x", "test", describe)
    assert [found.read(i) for i in range(2)] == ["a\u2028b\x85c\x1cd\x0ce\rf\r".encode(), b"g"]


def test_long_lines_take_linear_time_and_bounded_memory(tmp_path, monkeypatch):
    line = json.dumps({"a": "x" * 2**24}).encode()
    (tmp_path / "long").write_bytes(line + b"\n" + b"[" * 2**26 + b"\n{}")
    start = time.monotonic()
    found = Lines(tmp_path / "long", "test", lambda line: Described())
    assert found.read(0) == line and found.read(2) == b"{}" and found.numbers.tolist() == [1, 2, 3]
    assert time.monotonic() - start < 3  # it took seven, and the second one endless ones
    assert len(found.read(1)) < 2**26
    with pytest.raises(Broken, match="the limit is"):
        jsonl.parse_object(found.read(1))


@pytest.mark.parametrize(
    "change",
    [
        lambda columns: columns["sizes"].fill(2**30),
        lambda columns: columns["offsets"].fill(-5),
        lambda columns: columns.update(offsets=columns["offsets"][::-1].copy()),
        lambda columns: columns.update(offsets=columns["offsets"] + 2**40),
        lambda columns: columns.update(numbers=columns["numbers"][:5]),
        lambda columns: columns.update(numbers=columns["numbers"][:, None]),
    ],
)
def test_a_kept_index_that_does_not_fit_the_file_is_made_again(file, monkeypatch, change):
    monkeypatch.setattr(jsonl, "_KEEP_FROM", 100)
    good = Lines(file, "test", describe)
    kept = file.with_name(file.name + ".index.npz")
    with np.load(kept) as found:
        columns = {name: found[name] for name in found.files}
    change(columns)
    np.savez(kept, **columns)
    again = Lines(file, "test", describe)
    assert [again.read(i) for i in range(len(again))] == [good.read(i) for i in range(len(good))]
