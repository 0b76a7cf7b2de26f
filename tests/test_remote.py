"""Remote files, on an emulator of an object store."""

import errno
import pathlib

import pytest

from tokenflow_jax import files, remote
from tokenflow_jax.data import file_names


def test_files_are_read_in_ranges_and_written_in_one_step(bucket):
    remote.write(f"{bucket}/a/x.bin", bytes(range(100)))
    file = remote.RemoteFile(f"{bucket}/a/x.bin")
    assert (file.size, file.read(98, 10), file.read(100, 1)) == (100, b"bc", b"")
    with file.open() as opened:
        assert opened.read(3) == b"\0\1\2" and opened.seek(97) == 97
        assert opened.read() == b"abc"
    assert files.read_bytes(f"{bucket}/a/x.bin", 100) == bytes(range(100))
    with pytest.raises(ValueError, match="100 bytes, the limit is 99"):
        files.read_bytes(f"{bucket}/a/x.bin", 99)
    remote.write(f"{bucket}/a/x.bin", bytes(100))
    assert remote.RemoteFile(f"{bucket}/a/x.bin").version != file.version
    kinds = [remote.kind_of(f"{bucket}/{name}") for name in ("a/x.bin", "a", "b")]
    assert kinds == ["file", "folder", ""]


def test_what_is_missing_or_unknown_is_named_on_one_line(bucket):
    for path in (f"{bucket}/none", "gs://another-bucket/x"):
        with pytest.raises(FileNotFoundError, match="no such file or bucket") as error:
            remote.RemoteFile(path)
        assert error.value.filename == path
    for path, text in (("s3://b/x", r"s3fs.*\[s3\]"), ("xyz://b/x", "rotocol not known")):
        with pytest.raises(ValueError, match=text):
            remote.RemoteFile(path)


def test_a_store_that_refuses_is_an_error_of_access(bucket):
    class Refused(Exception):
        code = 403

    with (
        pytest.raises(PermissionError, match=r"access denied.*log in"),
        remote.named_errors("gs://b"),
    ):
        raise Refused("no\nway")
    with pytest.raises(OSError, match="odd") as error, remote.named_errors("gs://b/x"):
        raise RuntimeError("odd")
    assert (error.value.errno, error.value.filename) == (errno.EIO, "gs://b/x")


def test_copies_are_fetched_once_and_again_when_changed(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "_CHUNK", 1000)
    (tmp_path / "model" / "deep").mkdir(parents=True)
    for name in ("a.bin", "deep/b.bin", "config.json"):
        (tmp_path / "model" / name).write_bytes(name.encode() * 999)
    remote.upload(tmp_path / "model", f"{bucket}/model")
    assert remote.files_below(f"{bucket}/model") == ["a.bin", "config.json", "deep/b.bin"]
    copy = remote.local_copy(f"{bucket}/model/")
    assert copy.endswith("/model") and remote.local_copy(f"{bucket}/model/") == copy
    assert caplog.text.count("fetching") == 1
    for name in ("a.bin", "deep/b.bin", "config.json"):
        assert pathlib.Path(copy, name).read_bytes() == name.encode() * 999
    remote.write(f"{bucket}/model/a.bin", b"new")
    newer = remote.local_copy(f"{bucket}/model")
    assert newer != copy and pathlib.Path(newer, "a.bin").read_bytes() == b"new"
    assert remote.local_copy(tmp_path / "nothing") == str(tmp_path / "nothing")


def test_what_is_written_atomically_appears_when_it_is_complete(bucket):
    with pytest.raises(RuntimeError), files.write_atomically(f"{bucket}/out") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert not remote.kind_of(f"{bucket}/out")
    with files.write_atomically(f"{bucket}/out") as partial:
        partial.mkdir()
        (partial / "x").write_bytes(b"1")
    with (
        pytest.raises(FileExistsError, match="--overwrite"),
        files.write_atomically(f"{bucket}/out"),
    ):
        pass
    with files.write_atomically(f"{bucket}/out", overwrite=True) as partial:
        partial.write_bytes(b"a file")
    assert files.read_bytes(f"{bucket}/out", 100) == b"a file"


def test_names_of_data_files(bucket):
    for name in ("a-00.tar", "a-01.tar", "b-00.tar", ".c.tar", "deep/a-02.tar", "x.txt"):
        remote.write(f"{bucket}/{name}", b"")

    def names(path):
        found = file_names.expand(f"{bucket}/{path}", (".tar",), "remedy")
        return [name.removeprefix(f"{bucket}/") for name in found]

    assert names("a-{00..01}.tar") == names("a-*.tar") == ["a-00.tar", "a-01.tar"]
    assert names("") == names("*0*.tar") == ["a-00.tar", "a-01.tar", "b-00.tar"]
    assert names("{a,b}-00.tar") == ["a-00.tar", "b-00.tar"]
    for path in ("c-*.tar", "c-{0..9}.tar", "none"):
        with pytest.raises(ValueError, match="remedy"):
            names(path)
