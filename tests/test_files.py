"""Removing directories that are still being written, and recognizing a full disk."""

import errno
import os

import pytest
from late_writer import writing

from tokenflow_jax import files


def test_nothing_a_file_and_a_directory_are_removed(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "folder" / "inside" / "file").touch()
    for name in ("nothing", "file", "folder"):
        files.remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_remove_waits_for_a_writer_that_ends(tmp_path):
    with writing(tmp_path / "folder" / "deep", 1.0):
        files.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_writer_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_S", 0.3)
    with (
        writing(tmp_path / "folder", 2.0),
        pytest.raises(OSError, match=r"something keeps writing there: .*folder"),
    ):
        files.remove(tmp_path / "folder")


def test_other_errors_are_raised_at_once(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "folder" / "inside").mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        files.remove(tmp_path / "folder")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("OUT_OF_RANGE: Error writing: Failed to write 9 bytes: File too large [27]"),
    ],
)
def test_a_full_disk_is_recognized(error):
    assert files.full_disk(error) in str(error)


def test_another_error_is_not_a_full_disk():
    assert files.full_disk(ValueError("shape (2, 3) does not fit (3, 2)")) is None


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"[" * 100_000, "too deep"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ', "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b'["a"]', r"holds \['a'\], not a JSON object"),
        (b'{"b": 1}', "lacks 'a'"),
        (b'"' + b"x" * 10**6 + b'"', "not a JSON object"),
        (b" " * (files._MOST_JSON + 1), "the limit is"),
    ],
)
def test_a_json_file_is_read_or_named_in_a_short_error(tmp_path, content, error):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        files.read_json(tmp_path / "config.json", keys=("a",), remedy="; fetch it again")
    assert str(tmp_path / "config.json") in str(raised.value)
    assert str(raised.value).endswith("; fetch it again") and len(str(raised.value)) < 500


def test_a_json_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert files.read_json(tmp_path / "a.json") == {"a": [1]}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises((ValueError, OSError), match=r"not a regular file|Is a directory"):
            files.read_bytes(path, 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="11 bytes, the limit is 10"):
        files.read_bytes(tmp_path / "large", 10)
    with pytest.raises(ValueError, match=r"missing.json cannot be read \(.*No such file"):
        files.read_json(tmp_path / "missing.json")


@pytest.mark.parametrize("where", ["file/out", "full", "file"])
def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("in the way")
    if where == "full":
        device = lambda dir: open("/dev/full", "wb", 0)  # noqa: E731, SIM115
        monkeypatch.setattr(files.tempfile, "TemporaryFile", device)
    with pytest.raises(
        OSError, match=r"cannot write into the folder .*choose another one"
    ) as error:
        files.writable_folder(tmp_path / where)
    assert "\n" not in str(error.value)


def test_a_folder_to_write_to_is_made_and_left_empty(tmp_path):
    assert list(files.writable_folder(tmp_path / "a" / "b").iterdir()) == []


def test_reading_a_folder_keeps_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="Is a directory"):
            files.read_bytes(tmp_path, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "mine").touch()
    monkeypatch.chdir(tmp_path / "a" / "b")
    for path in ("", ".", "..", tmp_path / "a", "/"):
        with (
            pytest.raises(ValueError, match="is the current folder or above it"),
            files.write_atomically(path, overwrite=True) as partial,
        ):
            partial.mkdir()
    assert (tmp_path / "a" / "b" / "mine").exists()
    with (
        pytest.raises(ValueError, match="push_to_hub uploads"),
        files.write_atomically("hf://me/model"),
    ):
        pass
