"""Lines of text files: places, splits, the index of large files, JSON objects."""

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
    assert len(Lines(file, "test", describe)) == 122 and "indexing the lines again" in caplog.text
    assert len(Lines(file, "test", never)) == 122
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, kept.name]


def test_an_index_that_cannot_be_written(file, monkeypatch, caplog):
    monkeypatch.setattr(jsonl, "_KEEP_FROM", 100)
    (file.parent / "some.jsonl.index.npz").mkdir()
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
