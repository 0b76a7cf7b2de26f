"""Preparing at scale: splits, sizes and formats, notes on what is skipped, processes, kills."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from picture_files import encode, picture, plain
from PIL import Image

from tokenflow_jax import remote
from tokenflow_jax.data import images, packing, prepare, records, sources
from tokenflow_jax.data.packing import Packing


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run(*arguments):
    return prepare.run([str(a) for a in arguments])


def folder(path, count=60, make=plain):
    path.mkdir()
    for i in range(count):
        (path / f"{i:03d}.png").write_bytes(encode(make(i)))
    return path


def content(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def written(path, split="train"):
    source = sources.open_source("array_record", str(path), split)
    return [source[i] for i in range(len(source))]


def test_parts_are_the_same_for_any_processes_and_hosts(tmp_path, capsys):
    src = folder(tmp_path / "src")
    (src / "007.png").write_bytes(b"no picture")
    (src / "033.png").write_bytes(b"")
    options = ("folder", f"--src={src}", "--records_per_file=16", "--longest_side=12")
    assert run(*options, f"--dst={tmp_path / 'one'}", "--workers=1") == 0
    assert "{'train': 58, 'skipped': 2}" in capsys.readouterr().out
    assert run(*options, f"--dst={tmp_path / 'two'}", "--workers=2") == 0
    for host in (2, 0, 1):
        assert not (tmp_path / "three" / "dataset.json").exists()
        shard = (f"--shard_index={host}", "--shard_count=3", "--workers=1")
        assert run(*options, f"--dst={tmp_path / 'three'}", *shard) == 0
        said = capsys.readouterr().out
        assert ("others are still missing" in said) == (host != 1)
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two") == content(tmp_path / "three")
    assert list(one) == ["dataset.json", "preparing.json", "skipped.jsonl"] + [
        f"train-{i:05d}-of-00004.array_record" for i in range(4)
    ]
    about = json.loads(one["dataset.json"])
    assert about["skipped"] == {"not an image": 2} and about["splits"]["train"]["records"] == 58
    notes = [json.loads(line) for line in one["skipped.jsonl"].splitlines()]
    assert [note["name"] for note in notes] == ["007.png", "033.png"]
    assert notes[1] == {
        "split": "train", "name": "033.png", "reason": "not an image", "detail": "an empty file"
    }  # fmt: skip


def test_a_complete_data_set_is_left_alone(tmp_path, capsys):
    src, dst = folder(tmp_path / "src", 3), tmp_path / "dst"
    options = ("folder", f"--src={src}", f"--dst={dst}")
    assert run(*options) == 0
    before = {p: p.stat().st_mtime_ns for p in dst.glob("train-*.array_record")}
    assert run(*options) == 0 and "{'train': 3, 'skipped': 0}" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in dst.glob("train-*.array_record")}
    assert run(*options, "--format=webp") == 2
    said = capsys.readouterr().err
    assert "started with other settings: format was 'keep' and is 'webp'" in said
    assert "choose another folder or pass --overwrite" in said and said.count("\n") == 1
    assert run(*options, "--format=webp", "--overwrite") == 0
    assert images.kind_of(written(dst)[0]["bytes"]) == "WEBP"
    (src / "9.png").write_bytes(encode(plain(9)))
    assert run(*options, "--format=webp") == 2
    assert "splits was {'train': 3} and is {'train': 4}" in capsys.readouterr().err


def test_a_killed_command_continues(tmp_path):
    src = folder(tmp_path / "src", 40, lambda i: picture(i, 600, 800))
    options = ["folder", f"--src={src}", "--records_per_file=10", "--longest_side=500",
               "--format=webp", "--workers=2"]  # fmt: skip
    dst = tmp_path / "dst"
    command = [sys.executable, "-m", "tokenflow_jax.data.prepare", *options, f"--dst={dst}"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 30
    while not list(dst.glob("train-*.array_record")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in dst.glob("train-*.array_record")}
    assert 0 < len(done) < 4 and not (dst / "dataset.json").exists()
    while _alive(process.pid) and time.monotonic() < deadline:  # its workers end with it
        time.sleep(0.02)
    alive = _alive(process.pid)
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    assert not alive
    assert run(*options, f"--dst={dst}") == 0
    assert all((dst / name).stat().st_mtime_ns == when for name, when in done.items())
    assert run(*options[:-1], f"--dst={tmp_path / 'whole'}", "--workers=1") == 0
    assert content(dst) == content(tmp_path / "whole")


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_is_killed_is_an_error(tmp_path, capsys, monkeypatch):
    def killed(*arguments):
        raise packing.concurrent.futures.process.BrokenProcessPool("abruptly")

    monkeypatch.setattr(packing.concurrent.futures, "wait", killed)
    src = folder(tmp_path / "src", 4)
    options = ("folder", f"--src={src}", "--records_per_file=2", "--workers=2")
    assert run(*options, f"--dst={tmp_path / 'dst'}") == 2
    assert "run the same again, which continues" in capsys.readouterr().err


def test_sizes_and_formats(tmp_path):
    (tmp_path / "src").mkdir()
    large = {kind: encode(picture(1, 300, 600), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")}
    small = {kind: encode(picture(2, 40, 64), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")}
    thin = encode(picture(3, 10, 300))
    for kind in large.keys() | small.keys():
        for size, files in (("large", large), ("small", small)):
            if kind in files:
                (tmp_path / "src" / f"{size}.{kind.lower()}").write_bytes(files[kind])
    (tmp_path / "src" / "thin.png").write_bytes(thin)

    def packed(*options):
        arguments = (f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'dst'}", "--overwrite")
        assert run("folder", *arguments, *options) == 0
        return {e["name"]: e["bytes"] for e in written(tmp_path / "dst")}

    kept = packed()
    assert kept["large.jpeg"] == large["JPEG"] and len(kept) == 9
    kept = packed("--longest_side=100")
    assert "thin.png" not in kept, "100 x 3 pixels are too few"
    for kind in small:
        assert kept[f"small.{kind.lower()}"] == small[kind]
    for kind, then in (("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WEBP"), ("GIF", "PNG")):
        data = kept[f"large.{kind.lower()}"]
        assert images.kind_of(data) == then and images.decode(data).shape == (50, 100, 3)
    exact = images.fit_within(images.decode(large["PNG"]), 100)
    np.testing.assert_array_equal(images.decode(kept["large.png"]), exact)
    for name in ("webp", "jpeg"):
        rough, fine = (packed(f"--format={name}", f"--quality={q}") for q in (20, 95))
        assert {images.kind_of(data) for data in fine.values()} == {name.upper()}
        assert len(rough["large.png"]) < len(fine["large.png"])
        assert images.decode(fine["large.png"]).shape == (300, 600, 3)


@pytest.mark.parametrize(("height", "width", "side"), [(64, 128, 64), (300, 200, 64), (65, 65, 64)])
def test_the_filter_is_that_of_training(height, width, side):
    image = picture(0, height, width)
    found = images.fit_within(image, side)
    assert max(found.shape) == side
    if height == width:
        np.testing.assert_array_equal(found, images.center_crop(image, side))
    assert images.fit_within(found, side) is found
    halved = Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BOX)
    if (height, width) == (64, 128):
        np.testing.assert_array_equal(found, np.asarray(halved))


def test_notes_have_the_addresses(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    cells = pa.array([encode(plain(1)), b"no picture", None, b"no picture"])
    urls = pa.array(["http://a/0", "http://a/1", "http://a/2", None])
    pq.write_table(pa.table({"jpg": cells, "url": urls}), tmp_path / "x.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {
            "a.png": encode(plain(1)), "b.jpg": b"no picture", "b.json": b'{"url": "http://a/1"}',
            "c.jpg": b"no picture",
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.png").write_bytes(encode(plain(1)))
    rows = [{"image": "a.png"}, {"image": "missing.png", "url": "http://a/1"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reasons = {}
    for kind, name in (("parquet", "x.parquet"), ("webdataset", "x.tar"), ("jsonl", "x.jsonl")):
        dst = tmp_path / kind
        assert run(kind, f"--src={tmp_path / name}", f"--dst={dst}") == 0
        notes = [json.loads(line) for line in (dst / "skipped.jsonl").read_text().splitlines()]
        assert notes[0]["url"] == "http://a/1" and "url" not in (notes[-1] if notes[1:] else {})
        reasons[kind] = json.loads((dst / "dataset.json").read_text())["skipped"]
    assert reasons == {
        "parquet": {"no picture": 1, "not an image": 2}, "webdataset": {"not an image": 2},
        "jsonl": {"cannot be read": 1},
    }  # fmt: skip


def test_splits_are_those_of_the_source(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    (tmp_path / "parquet").mkdir()
    (tmp_path / "folder").mkdir()
    numbers = {"train": range(6), "validation": range(6, 9), "test": range(9, 11)}
    for split, some in numbers.items():
        cells = pa.table({"image": pa.array([encode(plain(i)) for i in some])})
        pq.write_table(cells, tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
        (tmp_path / "folder" / split / "cat").mkdir(parents=True)
        for i in some:
            (tmp_path / "folder" / split / "cat" / f"{i:02d}.png").write_bytes(encode(plain(i)))
    dst = tmp_path / "dst"
    for kind in ("parquet", "folder"):
        assert run(kind, f"--src={tmp_path / kind}", f"--dst={dst}", "--overwrite") == 0
        assert set(records.read_manifest(dst)["splits"]) == set(numbers)
        for split, some in numbers.items():
            found = [int(images.decode(e["bytes"])[0, 0, 0]) for e in written(dst, split)]
            assert found == list(some)


def test_parts_of_about_some_megabytes(tmp_path):
    noise = lambda i: np.random.default_rng(i).integers(0, 256, (200, 200, 3), np.uint8)  # noqa: E731
    src = folder(tmp_path / "src", 20, noise)  # 120 kB each
    assert run("folder", f"--src={src}", f"--dst={tmp_path / 'dst'}", "--shard_mb=1") == 0
    sizes = [p.stat().st_size for p in sorted((tmp_path / "dst").glob("*.array_record"))]
    assert len(sizes) == 3 and all(0.8e6 < size < 1.2e6 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--records_per_file=9", "--shard_mb=9"), "give --records_per_file or --shard_mb"),
        (("--shard_index=0",), "--shard_index and --shard_count go together"),
        (("--shard_index=2", "--shard_count=2"), "need 0 <= shard_index < shard_count"),
        (("--overwrite", "--shard_index=0", "--shard_count=2"), "--overwrite is for one host"),
        (("--quality=0",), "quality"),
        (("--format=gif",), "format"),
        (("--longest_side=3",), "longest_side 3 is below 8"),
    ],
)
def test_wrong_flags(tmp_path, capsys, options, message):
    src = folder(tmp_path / "src", 1)
    assert run("folder", f"--src={src}", f"--dst={tmp_path / 'dst'}", *options) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"format 'gif' is not one of .*; quality 0 is not within"):
        Packing("folder", str(src), format="gif", quality=0)


def test_to_a_bucket(tmp_path, bucket):
    src = folder(tmp_path / "src")
    (src / "007.png").write_bytes(b"no picture")
    options = ("folder", f"--src={src}", "--records_per_file=16", "--workers=1")
    assert run(*options, f"--dst={tmp_path / 'local'}") == 0
    for host in (1, 0):
        assert not remote.kind_of(f"{bucket}/dataset.json")
        assert run(*options, f"--dst={bucket}", f"--shard_index={host}", "--shard_count=2") == 0
    found = {name: remote.RemoteFile(f"{bucket}/{name}").read() for name in remote.names_in(bucket)}
    assert found == content(tmp_path / "local")
    assert written(bucket) == written(tmp_path / "local")
    assert run("cifar10", f"--src={src}", f"--dst={bucket}") == 2


def test_from_a_bucket(tmp_path, bucket):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    cells = pa.table({"image": pa.array([encode(plain(i)) for i in range(30)])})
    pq.write_table(cells, tmp_path / "train-0.parquet", row_group_size=8)
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "saved" / "x.arrow"), cells.schema) as out:
        out.write_table(cells)
    state = {"_data_files": [{"filename": "x.arrow"}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    remote.upload(tmp_path / "train-0.parquet", f"{bucket}/data/train-0.parquet")
    remote.upload(tmp_path / "saved", f"{bucket}/saved")
    for kind, name, local in (
        ("parquet", "", "train-0.parquet"), ("parquet", "data/train-*.parquet", "train-0.parquet"),
        ("arrow", "saved", "saved"),
    ):  # fmt: skip
        near, far = (sources.open_source(kind, path, "all") for path in (
            str(tmp_path / local), f"{bucket}/{name}".rstrip("/")))  # fmt: skip
        assert [far[i] for i in range(30)] == [near[i] for i in range(30)]


def test_a_damaged_part_is_named(tmp_path, capsys):
    src, dst = folder(tmp_path / "src", 3), tmp_path / "dst"
    options = ("folder", f"--src={src}", f"--dst={dst}")
    assert run(*options) == 0
    (dst / "dataset.json").unlink()
    part = next(dst.glob("*.array_record"))
    part.write_bytes(part.read_bytes()[:-9])
    assert run(*options) == 2
    said = capsys.readouterr().err
    assert f"{part} is no whole ArrayRecord file" in said and "remove it" in said


@pytest.mark.parametrize("kind", ["cifar10", "emoji"])
def test_sources_that_are_read_from_disks_only(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert run(kind, "--src=gs://bucket/x", "--dst=out") == 2
    assert "gs://bucket/x" in capsys.readouterr().err and not list(tmp_path.iterdir())
