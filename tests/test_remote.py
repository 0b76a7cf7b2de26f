"""Remote files, on an emulator of an object store."""

import errno
import os
import pathlib
import subprocess
import sys

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


@pytest.mark.parametrize("path", ["gs:/bucket/x", "gs:bucket/x", "gs:", "s3:/b/x", "hf:/me/model"])
def test_half_of_a_scheme_makes_no_folder_of_that_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (remote.kind_of, remote.local_copy, files.writable_folder, files.absolute):
        with pytest.raises(ValueError, match=r"write \w+:// "):
            use(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["GS://bucket/x", "gcs://bucket/x", "xyz://bucket/x"])
def test_paths_of_unknown_schemes_are_refused(path):
    for use in (files.absolute, files.writable_folder):
        with pytest.raises(ValueError, match="use gs://, s3:// or a path"):
            use(path)


def test_a_bucket_is_named_and_not_removed(bucket):
    with pytest.raises(ValueError, match="names no bucket: write gs://BUCKET/PATH"):
        remote.kind_of("gs://")
    for path in ("gs://bucket", "gs://bucket/"):
        with pytest.raises(ValueError, match="is a whole bucket"):
            remote.remove(path)


def test_a_folder_that_refuses_is_named(bucket, monkeypatch):
    with pytest.raises(OSError, match=r"cannot write into the folder gs://none/x .*choose another"):
        files.writable_folder("gs://none/x")


def test_objects_that_stand_for_folders(bucket):
    store, name = remote.store_of(f"{bucket}/folder")
    store.pipe_file(f"{name}/", b"")
    with pytest.raises(OSError, match="0 files to fetch"):
        remote.local_copy(f"{bucket}/folder")
    remote.write(f"{bucket}/folder/a.txt", b"a")
    assert remote.names_in(f"{bucket}/folder/") == ["a.txt"]


def test_names_may_have_any_characters(bucket):
    names = ["[x].txt", "a b.txt", "a#b.txt", "a%20b.txt", "a*?b.txt", "ü{1}.txt"]
    for name in names:
        remote.write(f"{bucket}/{name}", name.encode())
    assert remote.names_in(bucket) == sorted(names)
    for name in names:
        path = f"{bucket}/{name}"
        assert file_names.expand(path, (".txt",), "remedy") == [path]
        assert pathlib.Path(remote.local_copy(path)).read_bytes() == name.encode()


def test_a_store_that_refuses_is_an_error_of_access(bucket):
    class Refused(Exception):
        code = 403

    with (
        pytest.raises(PermissionError, match=r"access denied.*log in"),
        remote.named_errors("gs://b"),
    ):
        raise Refused("no\nway")
    with pytest.raises(PermissionError, match=r"no way\); log in"), remote.named_errors("gs://b"):
        raise OSError("Forbidden: b\nno way")  # as gcsfs says it
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


def test_copies_that_fail_leave_nothing_behind(bucket, monkeypatch):
    path, kept = f"{bucket}/x.bin", remote.cache_folder() / "files"
    remote.write(path, bytes(100))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:50], at))
    with pytest.raises(OSError, match=r"No space left.*set XDG_CACHE_HOME"):
        remote.local_copy(path)  # of a full disk the last write is a short one
    monkeypatch.undo()
    assert not [p for p in kept.glob("*/*") if p.name != ".lock"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(OSError, match=r"x\.bin cannot be copied into .*set XDG_CACHE_HOME"):
        remote.local_copy(path)


def test_what_a_killed_process_left_is_removed(bucket):
    remote.write(f"{bucket}/x.bin", b"1")
    folder = pathlib.Path(remote.local_copy(f"{bucket}/x.bin")).parent
    (folder / ".partial-left").mkdir()
    (folder / "x.bin").rename(folder / ".partial-left" / "x.bin")
    assert pathlib.Path(remote.local_copy(f"{bucket}/x.bin")).read_bytes() == b"1"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "x.bin"]


def test_what_is_written_again_meanwhile_is_not_kept(bucket, tmp_path):
    remote.write(f"{bucket}/x.bin", bytes(100))
    file = remote.RemoteFile(f"{bucket}/x.bin")
    remote.write(f"{bucket}/x.bin", bytes(100))
    with pytest.raises(OSError, match="written again while it was fetched"):
        file.fetch(tmp_path / "x.bin")


def test_a_file_that_cannot_be_replaced_stays(bucket, monkeypatch):
    remote.write(f"{bucket}/x.bin", b"old")
    monkeypatch.setattr(remote, "upload", lambda *_: pytest.fail("refused"))
    with (
        pytest.raises(pytest.fail.Exception),
        files.write_atomically(f"{bucket}/x.bin", overwrite=True) as partial,
    ):
        partial.write_bytes(b"new")
    assert files.read_bytes(f"{bucket}/x.bin", 10) == b"old"


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


def test_what_is_removed_is_no_pattern(bucket):
    for name in ("run[1]/x", "run1/x", "run*/x", "run2/x"):
        remote.write(f"{bucket}/{name}", b"")
    remote.remove(f"{bucket}/run*")
    remote.remove(f"{bucket}/run[1]/x")
    assert remote.names_in(bucket) == ["run1", "run2"]
    for name in ("run[1]", "run*", "run#1"):
        with pytest.raises(ValueError, match=r"choose another folder"):
            files.writable_folder(f"{bucket}/{name}")


def test_others_write_and_stores_fall_silent(bucket):
    """In a program that begins with a path of etils, which makes a file system of its own."""
    program = f"""
from tokenflow_jax import files, remote
folder = files.as_path("{bucket}/a")
files.as_path("{bucket}/a/1").write_text("")
seen = [path.name for path in folder.iterdir()]
remote.write("{bucket}/a/2", b"")
print(seen, [path.name for path in folder.iterdir()])
print(remote.store_of("{bucket}")[0].requests_timeout.sock_read)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['1'] ['1', '2']", "60.0"], done.stderr
