"""Pictures, captions, conversations and tars in a bucket: the same as on a disk."""

import io
import json
import tarfile

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax import remote
from tokenflow_jax.data import pipeline, ranges, records, sources
from tokenflow_jax.data.chat.conversations import JsonlConversations
from tokenflow_jax.data.examples import Broken


def examples(source):
    return [source[i] for i in range(len(source))]


def tar(numbers):
    """Return a shard with pictures of one color and captions."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as written:
        for i in numbers:
            for ending, data in (("png", encode(plain(i))), ("txt", b"about %d" % i)):
                info = tarfile.TarInfo(f"{i:03d}.{ending}")
                info.size = len(data)
                written.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def both(tmp_path, bucket):
    """A folder of pictures with captions and conversations, on a disk and in a bucket."""
    for label in ("cats", "dogs"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / label / f"{i}.png").write_bytes(encode(plain(i)))
    names = [f"{label}/{i}.png" for label in ("cats", "dogs") for i in range(3)]
    lines = [json.dumps({"image": name, "caption": f"of {name}"}) for name in names]
    (tmp_path / "data" / "captions.jsonl").write_text("\n".join(lines))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    lines = [json.dumps({"image": name, "conversations": turns}) for name in names]
    (tmp_path / "data" / "chat.jsonl").write_text("\n".join(lines))
    remote.upload(tmp_path / "data", f"{bucket}/data")
    return str(tmp_path / "data"), f"{bucket}/data"


@pytest.mark.parametrize("name", ["folder", "jsonl"])
def test_folders_and_captions(both, name):
    here, there = (sources.open_source(name, path, "all") for path in both)
    assert examples(here) == examples(there) and len(there) == 6
    assert here.classes == there.classes


def test_conversations(both):
    here, there = (JsonlConversations(f"{path}/chat.jsonl") for path in both)
    assert examples(here) == examples(there)
    assert there.image_bytes("cats/1.png") == here.image_bytes("cats/1.png")
    for name in ("../x.png", "/etc/passwd", "gs://bucket/x.png", "file:///etc/passwd"):
        with pytest.raises(Broken, match="outside the folder"):
            there.image_bytes(name)
    with pytest.raises(Broken, match="missing image"):
        there.image_bytes("cats/none.png")


def test_records(tmp_path, bucket):
    with records.DatasetWriter(tmp_path / "set", records_per_file=4) as writer:
        for i in range(10):
            writer.write("train", {"name": str(i), "bytes": encode(plain(i))})
    remote.upload(tmp_path / "set", f"{bucket}/set")
    here = sources.open_source("array_record", str(tmp_path / "set"), "train")
    there = sources.open_source("array_record", f"{bucket}/set", "train")
    pattern = sources.open_source("array_record", f"{bucket}/set/train-*.array_record", "train")
    assert examples(here) == examples(there) == examples(pattern)
    remote.remove(f"{bucket}/set/train-00001-of-00003.array_record")
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.array_record is missing"):
        sources.open_source("array_record", f"{bucket}/set", "train")
    with pytest.raises(ValueError, match=r"read from disks and gs:// only"):
        sources.RecordSource("s3://b/x-{0..3}.array_record", "all")


@pytest.mark.parametrize("block", [0, 8])
def test_tars(tmp_path, bucket, block, monkeypatch):
    for i in range(4):
        data = tar(range(i * 30, i * 30 + 30))
        (tmp_path / f"{i}.tar").write_bytes(data)
        remote.write(f"{bucket}/{i}.tar", data)
    options = {"image_size": 8, "flip": False, "augment": "center"}
    options |= {"shuffle_block": block, "shuffle_window": 40}
    found = []
    for path in (str(tmp_path), bucket):
        config = pipeline.DataConfig("webdataset", f"{path}/{{0..3}}.tar", "all", **options)
        reader = pipeline.train_batches(config, batch_size=6, seed=1)
        found.append(np.stack([next(reader)["image"][:, 0, 0, 0] for _ in range(20)]))
        reader.close()
    np.testing.assert_array_equal(*found)
    assert sorted(found[0].ravel()) == list(range(120))
    assert {f"{i}.tar.index.npz" for i in range(4)} < set(remote.names_in(bucket))
    assert ranges._AHEAD._bytes == 0 or block
    # The index is read, not made again: without the shard's headers it could not be.
    monkeypatch.setattr("tokenflow_jax.data.tar_index._make", lambda *_: pytest.fail("made again"))
    config = pipeline.DataConfig("webdataset", f"{bucket}/*.tar", "all", **options)
    assert len(pipeline.opened(config)) == 120


def test_ranges_read_ahead_are_used_once_and_bounded(bucket, monkeypatch):
    remote.write(f"{bucket}/x", bytes(range(200)))
    asked = []
    read = remote.RemoteFile.read
    monkeypatch.setattr(
        remote.RemoteFile, "read", lambda *args: asked.append(args[1:]) or read(*args)
    )
    file = ranges.open_ranges(f"{bucket}/x")
    file.will_need(100, 50)
    assert file.read(100, 20) + file.read(120, 30) == bytes(range(100, 150))
    assert asked == [(100, 50)]
    assert file.read(100, 2) == b"de" and asked[1:] == [(100, 2)]
    monkeypatch.setattr(ranges, "_AHEAD_BYTES", 100)
    for begin in (0, 60, 120):
        file.will_need(begin, 60)
    assert ranges._AHEAD._bytes == 60
    assert file.read(120, 60) == bytes(range(120, 180))


def test_a_tar_that_changed_or_is_cut_short(bucket):
    data = tar(range(40))
    remote.write(f"{bucket}/a.tar", data)
    source = sources.open_source("webdataset", f"{bucket}/a.tar", "all")
    remote.write(f"{bucket}/a.tar", data[: len(data) // 2])
    with pytest.raises(Broken, match=r"changed since the start|cannot be read"):
        source[30]
    short = sources.open_source("webdataset", f"{bucket}/a.tar", "all")
    assert 15 < len(short) < 30
    with pytest.raises(ValueError, match=r"none\.tar"):
        sources.open_source("webdataset", f"{bucket}/none.tar", "all")
