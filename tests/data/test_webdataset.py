"""WebDataset tars: what other tools write, damage, kept indexes, exact resume, captions, labels."""

import collections
import io
import json
import os
import pathlib
import subprocess
import tarfile

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax.data import pipeline, prepare, sources, tar_index, webdataset
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.data.text import PromptEncoder
from tokenflow_jax.data.webdataset import WebDatasetSource, shard_paths

LONG = "deep/" * 30 + "Bär " + "x" * 120  # beyond what USTAR can name


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of this test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tokenflow_jax"


def write(path, members, form=tarfile.PAX_FORMAT):
    """Write a tar of name -> content with Python's tarfile."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path, numbers, form=tarfile.PAX_FORMAT):
    """Write a shard as img2dataset does: pictures of one color, captions, objects, labels."""
    members = {}
    for i in numbers:
        row = {"caption": f"about {i}", "url": "http://x/y.jpg", "width": 16, "tags": ["t"]}
        members[f"{i:05d}.png"] = encode(plain(i % 256))
        members[f"{i:05d}.json"] = json.dumps(row).encode()
        members[f"{i:05d}.txt"] = f"число {i}\n".encode()
        members[f"{i:05d}.cls"] = b"%d" % (i % 10)
    return write(path, members, form)


def headers(path):
    """Return where each member begins."""
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def value_of(example):
    return int(pipeline.images.decode(example["bytes"])[0, 0, 0])


def everything(path, split="all"):
    source = WebDatasetSource(str(path), split)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes(tmp_path, form):
    long = "deep/" * 20 + "y" * 90 if form == tarfile.USTAR_FORMAT else LONG
    names = ["a.png", "Ä/ö.b.PNG", f"{long}.png", "./dot.png", "mask.seg.png", "mask.png"]
    hidden = [".hidden.png", "._a.png", "__MACOSX/._a.png", ".git/x.png", "./.y/z.png"]
    members = {name: encode(plain(i)) for i, name in enumerate([*names, *hidden])}
    path = write(tmp_path / "s.tar", {**members, f"{long}.txt": b"long", "alone.txt": b"x"}, form)
    found = {e["name"].removeprefix("s.tar/"): e for e in everything(path)}
    assert list(found) == ["a.png", "Ä/ö.b.PNG", f"{long}.png", "dot.png", "mask.png"]
    assert [value_of(e) for e in found.values()] == [0, 1, 2, 3, 5]
    assert found[f"{long}.png"]["caption"] == "long"


@pytest.mark.parametrize("form", ["ustar", "gnu", "oldgnu", "posix", "v7"])
def test_what_gnu_tar_writes(tmp_path, form):
    folder = tmp_path / "content" / "nested" / "folder"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(encode(plain(i)))
    for name in ("._0.png", ".DS_Store", "notes.md"):
        (folder / name).write_bytes(b"x")
    (folder / "link.png").symlink_to("0.png")
    os.link(folder / "0.png", folder / "hard.png")
    if form in ("gnu", "posix"):
        (folder / f"{'l' * 200}é.png").write_bytes(encode(plain(77)))
    path = tmp_path / "s.tar"
    command = ["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", tmp_path / "content"]
    subprocess.run([*command, "."], check=True)
    found = everything(path)
    assert [value_of(e) for e in found] == [0, 1, 2, 3, 4] + [77] * (form in ("gnu", "posix"))
    assert found[1]["name"] == "s.tar/nested/folder/1.png"


def test_a_sparse_file_and_properties_of_all_members(tmp_path, caplog):
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(2**20)
    (tmp_path / "a.png").write_bytes(encode(plain(3)))
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-Scf", tmp_path / "s.tar", "-C", tmp_path]
        subprocess.run([*command, "hole.png", "a.png"], check=True)
        assert [value_of(e) for e in everything(tmp_path / "s.tar")] == [3], form
    with tarfile.open(tmp_path / "g.tar", "w", pax_headers={"comment": "x" * 900}) as tar:
        tar.add(tmp_path / "a.png", "a.png")
    assert [value_of(e) for e in everything(tmp_path / "g.tar")] == [3]
    (tmp_path / "both.tar").write_bytes(
        (tmp_path / "s.tar").read_bytes() + (tmp_path / "g.tar").read_bytes()
    )
    assert len(everything(tmp_path / "both.tar")) == 1, "one key of two tars behind each other"
    assert "damaged" not in caplog.text and "truncated" not in caplog.text


def test_texts_and_labels(tmp_path):
    shard(tmp_path / "s.tar", range(3))
    source = WebDatasetSource(str(tmp_path / "s.tar"))
    assert source.numbers == ("label",)
    example = source[2]
    del example["bytes"]
    assert example == {
        "name": "s.tar/00002.png", "caption": "число 2", "captions": ["число 2", "about 2"],
        "tags": ["t"], "label": 2,
    }  # fmt: skip
    members = {f"{i}.png": encode(plain(i)) for i in range(8)}
    texts = {
        "0.json": b'{"text": ["a", "b"]}', "1.txt": b"\xff", "2.json": b"[1]", "3.json": b'{"a": ',
        "4.cls": b"cat", "5.cls": b"-7", "6.json": b'{"caption": null}', "7.txt": b"\xef\xbb\xbf x",
    }  # fmt: skip
    source = WebDatasetSource(str(write(tmp_path / "t.tar", {**members, **texts})))
    assert source[0]["captions"] == ["a", "b"] and source[7]["caption"] == "x"
    assert "caption" not in source[6]
    reasons = {
        1: "not UTF-8", 2: "no object", 3: "invalid JSON", 4: "damaged label", 5: "damaged record"
    }  # fmt: skip
    for index, reason in reasons.items():
        with pytest.raises(Broken) as caught:
            source[index]
        assert caught.value.reason == reason


def test_which_shards(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-08", "[x]"):
        shard(tmp_path / f"{name}.tar", range(2))

    def names(path):
        return [pathlib.Path(file).stem for file in shard_paths(str(tmp_path / path))]

    assert names("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert names("{a,b}-08.tar") == ["a-08", "b-08"]
    assert names("a-*.tar") == ["a-08", "a-09", "a-10"]
    assert names("[x].tar") == ["[x]"] and len(names("")) == 5
    wrong = {
        "a-{08..12}.tar": r"a-11.tar is missing, 2 of 5 shards are; name a \.tar",
        "c.tar": "c.tar is missing",
        "c*.tar": "names no shards",
        "{0..999999999}.tar": "more than 1,000,000",
        "{0..9999}{0..9999}": "more than 1,000,000",
    }
    for path, text in wrong.items():
        with pytest.raises(ValueError, match=text):
            names(path)
    with pytest.raises(ValueError, match="programs are not run"):
        shard_paths("pipe:cat x")
    assert len(everything(tmp_path / "a-{08..10}.tar")) == 6


def test_what_is_no_tar_is_refused_by_name(tmp_path):
    for ending, mode in (("gz", "w:gz"), ("bz2", "w:bz2"), ("xz", "w:xz")):
        with tarfile.open(tmp_path / f"{ending}.tar", mode) as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(ValueError, match=rf"{ending}\.tar is compressed.*un"):
            WebDatasetSource(str(tmp_path / f"{ending}.tar"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.tar.gz").touch()
    with pytest.raises(ValueError, match=r"only compressed tars such as x\.tar\.gz: gunzip"):
        WebDatasetSource(str(tmp_path / "folder"))
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("no tar\n" * 1000)
    os.mkfifo(tmp_path / "pipe.tar")
    for name, text in (("empty", "no tar"), ("text", "no tar"), ("pipe", "not a regular file")):
        with pytest.raises(ValueError, match=rf"{name}\.tar is {text}"):
            WebDatasetSource(str(tmp_path / f"{name}.tar"))


def test_without_pictures(tmp_path, caplog):
    write(tmp_path / "0.tar", {"a.txt": b"x"})
    write(tmp_path / "1.tar", {"a.png": encode(plain(1))})
    assert len(everything(tmp_path)) == 1
    assert "0.tar holds no pictures" in caplog.text and "1 keys without a picture" in caplog.text
    with pytest.raises(ValueError, match="has no pictures in split 'train'"):
        sources.open_source("webdataset", str(tmp_path / "0.tar"), "train")


def test_a_truncated_shard_is_read_up_to_its_last_whole_member(tmp_path, caplog):
    whole = shard(tmp_path / "whole.tar", range(20)).read_bytes()
    path = tmp_path / "cut.tar"
    starts = [at for name, at in headers(tmp_path / "whole.tar").items() if name.endswith("png")]
    for cut in [*range(513, len(whole) - 10_240, 1999), starts[7], starts[7] + 1600]:
        caplog.clear()
        path.write_bytes(whole[:cut])
        expected = [i for i, start in enumerate(starts) if start + 1536 < cut]
        found = everything(path)
        assert abs(len(found) - len(expected)) <= 1
        assert [value_of(e) for e in found] == list(range(len(found)))
        assert "cut.tar is truncated" in caplog.text and "fetch it again" in caplog.text
    assert "truncated in the middle of '00007.png'" in caplog.text


def test_damaged_headers_lose_only_their_members(tmp_path, caplog):
    path = shard(tmp_path / "s.tar", range(20), tarfile.USTAR_FORMAT)
    whole = bytearray(path.read_bytes())
    start = headers(path)
    rng = np.random.default_rng(0)
    at = start["00003.png"]
    whole[at : at + 512] = rng.bytes(512)
    for name, size in (("00005.png", b"77777777777"), ("00009.txt", b"00077777777")):
        info = tarfile.TarInfo(name)
        info.size = int(size, 8)
        whole[start[name] : start[name] + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    negative = bytearray(tarfile.TarInfo("00012.png").tobuf(tarfile.USTAR_FORMAT))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % tarfile.calc_chksums(negative)[0]
    whole[start["00012.png"] : start["00012.png"] + 512] = negative
    path.write_bytes(whole)
    for _ in range(2):  # from the shard, and from the kept index
        caplog.clear()
        numbers = [value_of(e) for e in everything(path)]
        assert numbers == [i for i in range(20) if i not in (3, 5, 12)]
        assert f"damaged at byte {at:,} and at 3 more places" in caplog.text
        webdataset._opened.cache_clear()
    assert everything(path)[7]["caption"] == "about 9"


def test_endless_damage_ends(tmp_path):
    """Each of these blocks is a header that reads on into the next."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**19
    block = info.tobuf(tarfile.USTAR_FORMAT)
    good = write(tmp_path / "good.tar", {"a.png": encode(plain(1))}).read_bytes()
    (tmp_path / "s.tar").write_bytes(good[:-10_240] + block * 3000)
    assert not everything(tmp_path / "s.tar")
    info.type, info.size = tarfile.XHDTYPE, 8**11 - 1
    (tmp_path / "t.tar").write_bytes(good + info.tobuf(tarfile.USTAR_FORMAT) * 100)
    assert len(everything(tmp_path / "t.tar")) == 1


def test_a_broken_picture_is_counted(tmp_path):
    members = {"a.png": encode(plain(1)), "b.jpg": b"no picture", "c.png": encode(plain(1, 4))}
    members |= {"d.png": encode(np.zeros((8, 80, 3), np.uint8)), "e.png": encode(plain(2))}
    write(tmp_path / "s.tar", {**members, "e.txt": b"much too long"})
    config = pipeline.DataConfig(
        "webdataset", str(tmp_path / "s.tar"), image_size=8, max_aspect=9, max_caption=5
    )
    decoded = pipeline.opened(config)
    assert [decoded[i] is None for i in range(5)] == [False, True, True, True, True]
    assert decoded.skipped.counts() == {
        "not an image": 1, "too small": 1, "too elongated": 1, "caption length": 1,
    }  # fmt: skip


def no_scan(*args):
    raise AssertionError("went through the shard again")


def test_indexes_are_kept(tmp_path, monkeypatch):
    path = shard(tmp_path / "s.tar", range(200))
    first = everything(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar", "s.tar.index.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_make", no_scan)
        webdataset._opened.cache_clear()
        assert everything(path) == first
    shard(path, range(100, 150))
    assert [value_of(e) for e in everything(path)] == list(range(100, 150))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, cache, caplog):
    path = shard(tmp_path / "s.tar", range(3))
    (tmp_path / "s.tar.index.npz").mkdir()  # refuses even root
    everything(path)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_make", no_scan)
        webdataset._opened.cache_clear()
        assert len(everything(path)) == 3 and not caplog.text
    kept.unlink()
    kept.mkdir()
    webdataset._opened.cache_clear()
    assert len(everything(path)) == 3
    assert "cannot be written" in caplog.text and "0 more shards again" in caplog.text


def test_hostile_indexes_are_made_again(tmp_path, caplog):
    path, kept = shard(tmp_path / "s.tar", range(20)), tmp_path / "s.tar.index.npz"
    expected = everything(path)
    with np.load(kept) as file:
        right = dict(file)
    far = right["picture_at"] + np.uint32(10**6)
    wrong = [
        {"picture_at": far}, {"picture_size": right["picture_size"] * np.uint32(1000)},
        {"header": right["picture_at"]}, {"txt_at": far}, {"txt_at": right["txt_at"][1:]},
        {"json_at": right["json_at"].astype(np.int64)}, {"held_out": np.array([None] * 20)},
        {"cls_at": right["cls_at"].reshape(4, 5)},
    ]  # fmt: skip
    for change in wrong:
        caplog.clear()
        np.savez(kept, **{**right, **change})
        webdataset._opened.cache_clear()
        assert everything(path) == expected and "made again" in caplog.text
    np.savez_compressed(kept, **right)
    for data in (kept.read_bytes(), b"", b"PK\x03\x04" + bytes(99), b"\x93NUMPY" + bytes(99)):
        kept.write_bytes(data)
        webdataset._opened.cache_clear()
        assert everything(path) == expected
    # Places inside the shard that are no pictures: broken examples, at worst.
    np.savez(kept, **{**right, "picture_at": right["txt_at"], "header": right["header"] + 1})
    webdataset._opened.cache_clear()
    source = WebDatasetSource(str(path))
    for i in range(20):
        try:
            pipeline.images.decode(source[i]["bytes"])
        except Broken:
            continue
        raise AssertionError("a text is no picture")


def test_large_shards_are_indexed_by_other_programs(tmp_path, monkeypatch):
    for i in range(20):
        shard(tmp_path / f"{i:02d}.tar", [i])
    monkeypatch.setattr(tar_index, "_LARGE", 0)
    monkeypatch.setattr(tar_index, "_make", no_scan)
    assert [value_of(e) for e in everything(tmp_path)] == list(range(20))


def test_a_shard_that_changes_under_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "_OPEN_FILES", 1)
    for i in range(3):
        shard(tmp_path / f"{i}.tar", range(2))
    source = WebDatasetSource(str(tmp_path))
    assert [len(source[i]["bytes"]) > 0 for i in range(6)] == [True] * 6
    (tmp_path / "0.tar").write_bytes(b"short")
    (tmp_path / "1.tar").unlink()
    for index in (0, 2):
        with pytest.raises(Broken, match="cannot be read"):
            source[index]
    assert source[5]["label"] == 1


def make_shards(folder, count):
    """Write 161 or 160 pictures in three forms; the last shard is truncated."""
    forms, each = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT), 161 // count
    for i in range(count):
        path = shard(folder / f"{i:05d}.tar", range(each * i, each * (i + 1)), forms[i % 3])
    path.write_bytes(path.read_bytes()[: -10_240 - 3000])
    return str(folder / f"{{00000..{count - 1:05d}}}.tar")


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, 7)


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize(("shares", "files"), [(1, 3), (2, 7), (3, 40)])
def test_every_picture_once_per_pass_and_exact_resume(tmp_path, shares, files, block):
    shards = make_shards(tmp_path, files)
    config = pipeline.DataConfig(
        "webdataset", shards, "all", 8, "center", shuffle_block=block, shuffle_window=32
    )
    count = len(pipeline.opened(config))
    assert 155 <= count <= 160

    def group(number):
        return [
            pipeline.train_batches(
                config, batch_size=6 // number, seed=3, shard_index=i, shard_count=number
            )
            for i in range(number)
        ]

    def step(group):
        return np.concatenate([next(share)["image"][:, 0, 0, 0] for share in group])

    reference = group(1)
    steps = [step(reference) for _ in range(count // 3 + 2)]
    values = np.concatenate(steps)
    for epoch in (values[:count], values[count : 2 * count]):
        assert collections.Counter(epoch.tolist()) == collections.Counter(range(count))
    current = group(shares)
    for number in range(4):
        np.testing.assert_array_equal(step(current), steps[number])
    for then, first in ((shares, 4), (shares % 3 + 1, 6)):
        states = json.loads(json.dumps([share.get_state() for share in current]))
        current = group(then)
        for share in current:
            share.set_state(states)
        for number in (first, first + 1):
            np.testing.assert_array_equal(step(current), steps[number])


def test_splits_do_not_depend_on_the_order_of_shards(shards):
    train, heldout = (WebDatasetSource(shards, split) for split in ("train", "heldout"))
    held = {heldout[i]["name"] for i in range(len(heldout))}
    assert 5 < len(held) < 30
    assert held.isdisjoint(train[i]["name"] for i in range(len(train)))
    some = everything(shards.replace("{00000..00006}", "{00006..00002}"), "val")
    assert {e["name"] for e in some} <= held and len(some) > 3


def test_prepare(shards, tmp_path, capsys):
    dst = tmp_path / "records"
    assert prepare.run(["webdataset", f"--src={shards}", f"--dst={dst}"]) == 0
    assert "'skipped': 0" in capsys.readouterr().out
    records = sources.open_source("array_record", str(dst), "train")
    train = WebDatasetSource(shards, "train")
    assert len(records) == len(train) and records.numbers == ("label",)
    for i in range(0, len(train), 11):
        assert {**records[i], "group": -1} == {**train[i], "group": -1}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="of Linux")
def test_what_a_mix_of_blocks_needs_is_read_ahead(shards, monkeypatch):
    """Each host its own part, once, in runs."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append(call[1:3]))
    config = pipeline.DataConfig("webdataset", shards, "all", 8, "center", cache_megabytes=0)
    source = pipeline.opened(config).source
    source.will_need(np.arange(30, 60))
    # Rows 30 to 45 of a shard with 4 kB per sample, 46 to 59 of one with 8 kB.
    assert [round(size / 2**12) for _, size in asked] == [16, 28]
    wanted = []
    monkeypatch.setattr(source, "will_need", lambda items: wanted.append(items.tolist()))
    for share in range(2):
        blocks = {"shuffle_block": 16, "shuffle_window": 32}
        config = pipeline.dataclasses.replace(config, **blocks, threads=1, buffer=1)
        batches = pipeline.train_batches(
            config, batch_size=4, seed=0, shard_index=share, shard_count=2
        )
        for _ in range(4):
            next(batches)
        batches.close()
    firsts = [items for items in wanted if len(items) == 16][:2]
    assert len(firsts) == 2 and set(firsts[0]).isdisjoint(firsts[1])


def test_captions_for_generation(shards):
    config = pipeline.DataConfig(
        "webdataset", shards, "all", 8, "center", flip=False, min_caption=8, max_caption=8
    )
    pictures, prompts = captions.Pictures(config), PromptEncoder(ByteTokenizer(), 24)
    options = {"batch_size": 4, "seed": 0, "shuffle_block": 4, "shuffle_window": 16}
    batch = next(captions.train_batches(pictures, captions.CaptionConfig(), prompts, **options))
    for prefix, image in zip(batch["prefix"], batch["image"], strict=True):
        text = prompts.text_tokenizer.decode(prefix, skip_special_tokens=True)
        number = int(text.removesuffix("<img>").split()[-1])
        assert number == image[0, 0, 0] and 10 <= number < 100, "of eight characters"
