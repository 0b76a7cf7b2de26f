"""Batches: order, resume, hosts, broken pictures, evaluation."""

import dataclasses
import json
import logging
import time

import numpy as np
import pytest
from config_files import tokenizer
from picture_files import encode, picture, plain

from tokenflow_jax.data import pipeline, records, sources
from tokenflow_jax.data.examples import Broken, fitting_captions
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.train.checkpoint import CheckpointError
from tokenflow_jax.train.loop import check_config_change
from tokenflow_jax.train.run_config import BEFORE

EMOJI = DataConfig("emoji", image_size=16)


@pytest.fixture
def numbered(tmp_path):
    """A data set of 23 one-color pictures; picture i is labeled i and has the value 10 i."""
    with records.DatasetWriter(tmp_path / "numbered") as writer:
        for i in range(23):
            example = {"name": str(i), "label": i, "bytes": encode(plain(10 * i))}
            writer.write("train", example)
    return DataConfig("array_record", path=str(tmp_path / "numbered"), image_size=12)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def train(config, **options):
    return pipeline.train_batches(config, **{"batch_size": 8, "seed": 0, **options})


def test_train_batch_of_emoji():
    batch = next(train(EMOJI))
    assert batch.keys() == {"image", "group"}
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 16, 16, 3), np.uint8)
    assert (batch["group"].shape, batch["group"].dtype) == ((8,), np.int32)
    assert set(batch["group"]) <= set(range(8))


def test_batches_depend_on_seed_alone():
    first = take(train(EMOJI), 3)
    assert_same(first, take(train(EMOJI), 3))
    assert_same(first, take(train(dataclasses.replace(EMOJI, threads=5, buffer=3)), 3))
    assert (first[0]["image"] != next(train(EMOJI, seed=1))["image"]).any()


def test_image_belongs_to_its_label(numbered):
    for batch in take(train(numbered), 5):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 10 * batch["label"])


def test_epochs_are_whole_and_differ(numbered):
    labels = np.concatenate([b["label"] for b in take(train(numbered, batch_size=23), 3)])
    epochs = labels.reshape(3, 23)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
        assert (epoch != np.arange(23)).any()
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_crops_differ_between_epochs(tmp_path):
    (tmp_path / "one.png").write_bytes(encode(picture(0, 60, 90)))
    config = DataConfig("folder", path=str(tmp_path), image_size=24)
    images = [b["image"].tobytes() for b in take(train(config, batch_size=1), 8)]
    assert len(set(images)) == 8
    still = dataclasses.replace(config, augment="center", flip=False)
    assert len({b["image"].tobytes() for b in take(train(still, batch_size=1), 8)}) == 1


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_resume_is_exact(taken):
    whole = train(EMOJI)
    take(whole, taken)
    state = json.loads(json.dumps(whole.get_state()))  # as a checkpoint keeps it
    expected = take(whole, 4)
    resumed = train(EMOJI)
    take(resumed, 2)
    resumed.set_state(state)
    assert_same(take(resumed, 4), expected)


def test_resume_is_exact_across_epochs_and_broken_pictures(tmp_path, write_broken):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encode(picture(i)))
    write_broken(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), image_size=16)
    whole = train(config, batch_size=4)
    take(whole, 6)
    state = whole.get_state()
    resumed = train(config, batch_size=4)
    resumed.set_state(state)
    assert_same(take(resumed, 6), take(whole, 6))


def test_position_of_other_data_is_refused(numbered):
    state = train(numbered, seed=3).get_state()
    with pytest.raises(ValueError, match=r"seed was 3 and is 0.*Restore these settings"):
        train(numbered).set_state(state)
    with pytest.raises(ValueError, match=r"data was 'array_record train'.*pictures was 23 and is"):
        train(EMOJI, seed=3).set_state(state)


def test_hosts_share_one_stream():
    whole = take(train(EMOJI, batch_size=12), 3)
    hosts = [train(EMOJI, batch_size=4, shard_index=i, shard_count=3) for i in range(3)]
    for batch in whole:
        shares = [next(host) for host in hosts]
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([s[key] for s in shares]), batch[key])


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0), (0, 24)])
def test_bad_shards(numbered, index, count):
    with pytest.raises(ValueError, match="need 0 <= shard_index < shard_count <= pictures"):
        train(numbered, shard_index=index, shard_count=count)
    with pytest.raises(ValueError, match="need 0 <= shard_index < shard_count <= pictures"):
        pipeline.eval_batches(numbered, batch_size=2, shard_index=index, shard_count=count)


def test_hostile_files_are_skipped_and_named(tmp_path, write_broken, caplog):
    for i in range(3):
        (tmp_path / f"good{i}.png").write_bytes(encode(plain(50 * i + 50)))
    write_broken(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), image_size=16)
    with caplog.at_level(logging.WARNING):
        batches = take(train(config), 6)
    for batch in batches:  # always full
        assert batch["image"].shape == (8, 16, 16, 3)
        assert set(batch["image"][:, 0, 0, 0]) <= {50, 100, 150}
    expected = {"damaged": 1, "not an image": 1, "too small": 1, "too large": 1}
    assert pipeline.opened(config).skipped.counts() == expected
    for name in ("truncated.jpg", "text.png", "pixel.png", "bomb.png"):
        assert caplog.text.count(f"folder {tmp_path} train: skipped {name}: ") == 1
    (note,) = pipeline.skipped_notes(config)
    assert "skipped 4 of 7 pictures" in note
    assert "bomb.png" in note
    assert pipeline.skipped_notes(EMOJI) == []


def test_one_good_picture_among_many_broken_ones_is_enough(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(plain(7)))
    for i in range(30):
        (tmp_path / f"{i}.png").write_text("broken")
    config = DataConfig("folder", path=str(tmp_path), image_size=8)
    for seed in range(3):
        for batch in take(train(config, batch_size=4, seed=seed), 5):
            assert (batch["image"] == 7).all()


def test_log_is_not_flooded(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(encode(plain(7)))
    for i in range(70):
        (tmp_path / f"{i}.png").write_text("broken")
    config = DataConfig("folder", path=str(tmp_path), image_size=8)
    with caplog.at_level(logging.WARNING):
        take(train(config, batch_size=2), 3)
    here = f"folder {tmp_path} train: skipped "
    messages = [r.getMessage() for r in caplog.records if r.getMessage().startswith(here)]
    assert sum(".png: not an image" in m for m in messages) == 20
    assert [m.removeprefix(here) for m in messages[20:]] == [
        "32 so far: {'not an image': 32}",
        "64 so far: {'not an image': 64}",
    ]
    assert pipeline.opened(config).skipped.counts() == {"not an image": 70}


@pytest.mark.parametrize("batches", [train, pipeline.eval_batches])
def test_a_dropped_iterator_reads_no_further(tmp_path, monkeypatch, batches):
    (tmp_path / "one.png").write_bytes(encode(plain(7)))
    config = DataConfig("folder", path=str(tmp_path), image_size=8, threads=2)
    example = pipeline.opened(config)[0]
    read = []

    def slow_to_read(self, index):
        read.append(index)
        time.sleep(0.01)
        return example

    monkeypatch.setattr(pipeline.Decoded, "__getitem__", slow_to_read)
    monkeypatch.setattr(pipeline.Decoded, "__len__", lambda self: 1000)
    iterator = batches(config, batch_size=1)
    next(iterator)
    del iterator
    counts = [-1, len(read)]
    while counts[-1] > counts[-2]:  # the two threads finish what they started
        time.sleep(0.5)
        counts.append(len(read))
    assert counts[-1] < 100


@pytest.mark.parametrize("shard_count", [1, 2])
def test_nothing_usable_is_an_error(tmp_path, write_broken, shard_count):
    write_broken(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), image_size=16)
    with pytest.raises(ValueError, match=r"no usable picture among the 4.*'too large': 1"):
        next(train(config, shard_count=shard_count))
    with pytest.raises(ValueError, match="no usable picture among the 4"):
        list(pipeline.eval_batches(dataclasses.replace(config, split="all"), batch_size=3))


def test_limits_reach_the_decoder(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture(0, 30, 30)))
    (tmp_path / "b.png").write_bytes(encode(picture(1, 50, 50)))
    config = DataConfig("folder", path=str(tmp_path), image_size=16, max_pixels=1000)
    take(train(config), 2)
    assert pipeline.opened(config).skipped.counts() == {"too large": 1}
    raw = tmp_path / "raw"
    with records.DatasetWriter(raw, compressed_payload=False) as writer:
        writer.write("train", {"name": "small", "image": plain(1, side=4)})
        writer.write("train", {"name": "good", "image": plain(2, side=9)})
    config = DataConfig("array_record", path=str(raw), image_size=16)
    assert (next(train(config))["image"] == 2).all()
    assert pipeline.opened(config).skipped.counts() == {"too small": 1}


def test_small_data_set_is_decoded_once(tmp_path, monkeypatch):
    files = [encode(picture(100 + i)) for i in range(6)]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(data)
    decode, calls = pipeline.images.decode, []

    def counting(data, **options):
        if data in files:  # other tests' iterators may still be reading ahead
            calls.append(data)
        return decode(data, **options)

    monkeypatch.setattr(pipeline.images, "decode", counting)
    small = DataConfig("folder", path=str(tmp_path), image_size=16, threads=1)
    cached = take(train(small), 8)
    assert len(calls) == 6
    never = dataclasses.replace(small, cache_megabytes=0)
    assert_same(take(train(never), 8), cached)
    assert len(calls) >= 6 + 64


def test_eval_shows_every_picture_once_in_order(numbered):
    batches = list(pipeline.eval_batches(numbered, batch_size=5))
    assert len(batches) == 5
    for batch in batches:
        assert batch["image"].shape == (5, 12, 12, 3)
    mask, labels, index = (
        np.concatenate([b[key] for b in batches]) for key in ("mask", "label", "index")
    )
    np.testing.assert_array_equal(mask, np.arange(25) < 23)
    np.testing.assert_array_equal(labels[mask], np.arange(23))
    np.testing.assert_array_equal(index[mask], np.arange(23))
    np.testing.assert_array_equal(labels[~mask], -1)
    assert not batches[-1]["image"][3:].any()
    assert_same(list(pipeline.eval_batches(numbered, batch_size=5)), batches)


def test_eval_limit_is_spread_over_the_data(numbered):
    (batch,) = pipeline.eval_batches(numbered, batch_size=5, limit=5)
    np.testing.assert_array_equal(batch["label"], [0, 4, 9, 13, 18])
    assert len(list(pipeline.eval_batches(numbered, batch_size=5, limit=1000))) == 5


@pytest.mark.parametrize("limit", [None, 9, 1])
def test_eval_hosts_get_equally_many_batches(numbered, limit):
    shares = [
        list(
            pipeline.eval_batches(numbered, batch_size=4, limit=limit, shard_index=i, shard_count=3)
        )
        for i in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [b["label"][b["mask"]] for share in shares for b in share]
    (whole,) = pipeline.eval_batches(numbered, batch_size=23, limit=limit)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), whole["label"][whole["mask"]])


def test_eval_masks_broken_pictures(tmp_path, write_broken):
    (tmp_path / "a_good.png").write_bytes(encode(plain(80)))
    (tmp_path / "z_good.png").write_bytes(encode(plain(90)))
    write_broken(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), split="all", image_size=16)
    (batch,) = pipeline.eval_batches(config, batch_size=6)
    np.testing.assert_array_equal(batch["mask"], [True, False, False, False, False, True])
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [80, 0, 0, 0, 0, 90])


def test_index_is_the_place_in_the_source():
    config = dataclasses.replace(EMOJI, split="heldout")
    source = sources.EmojiSource("heldout")
    rows = [{k: v for k, v in source[i].items() if k != "bytes"} for i in range(len(source))]
    assert len(rows) == 158
    batch = next(pipeline.eval_batches(config, batch_size=158))
    for index, group in zip(batch["index"], batch["group"], strict=True):
        assert rows[index]["group"] == group
    assert all(row.keys() == {"name", "caption", "tags", "group"} for row in rows)
    assert source.classes == pipeline.opened(config).source.classes == []


def test_pictures_without_a_class_get_minus_one(tmp_path):
    for name in ("a/1.png", "b/2.png", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(plain(5)))
    config = DataConfig("folder", path=str(tmp_path), split="all", image_size=8)
    (batch,) = pipeline.eval_batches(config, batch_size=3)
    np.testing.assert_array_equal(batch["label"], [-1, 0, 1])
    assert set(next(train(config, batch_size=3))["label"]) == {-1, 0, 1}
    assert pipeline.opened(config).source.classes == ["a", "b"]


def test_all_bad_config_values_are_named():
    with pytest.raises(ValueError, match=r"augment 'crop' is not one of .*; image_size is 0.*; b"):
        DataConfig("emoji", augment="crop", image_size=0, buffer=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        train(EMOJI, batch_size=0)


def test_groups_are_those_of_the_emoji():
    assert len(sources.GROUPS) == 8


def test_pictures_that_vanish_later_end_the_training(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encode(plain(i)))
    config = DataConfig("folder", path=str(tmp_path), image_size=8, cache_megabytes=0, threads=5)
    batches = train(config, batch_size=3)
    take(batches, 9)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no usable picture among the 6.*cannot be read': 6") as e:
        take(batches, 400)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_what_the_cache_holds_counts_as_usable(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(plain(7)))
    (tmp_path / "bad.png").write_text("broken")
    batches = train(DataConfig("folder", path=str(tmp_path), image_size=8), batch_size=2)
    assert all((batch["image"] == 7).all() for batch in take(batches, 200))


def test_bad_records_are_skipped_and_counted(tmp_path, monkeypatch):
    headers = [
        {"name": "a", "shape": [-1, 3, 3]}, {"name": "b", "shape": [16, 16, 4]},
        {"name": "c", "shape": [2**40, 2**40, 3]}, {"name": "d", "shape": "16"},
        {"name": "e", "shape": [True, 16, 3]}, {"name": "f", "label": "cat"},
        {"name": "g", "label": 2**40}, {"name": "h", "group": [1]}, {"name": 5}, {},
        {"name": "i", "label": 1.5}, {"name": "j", "image": [1, 2]}, [], {"name": "k", "tags": [3]},
    ]  # fmt: skip
    raw = [json.dumps(header).encode() for header in headers]
    raw += [b'{"name": "l", "label": ' + b"9" * 5000 + b"}", b"[" * 100_000]
    with records.DatasetWriter(tmp_path / "d", compressed_payload=False) as writer:
        writer.write("train", {"name": "good", "label": 3, "image": plain(7)})
        for header in raw:
            record = b"TFX1" + len(header).to_bytes(4, "little") + header + plain(1).tobytes()
            monkeypatch.setattr(records, "pack", lambda example, record=record: record)
            writer.write("train", {})
    config = DataConfig("array_record", path=str(tmp_path / "d"), image_size=8)
    for batch in take(train(config, batch_size=4), 30):
        assert (batch["image"] == 7).all() and (batch["label"] == 3).all()
    counts = pipeline.opened(config).skipped.counts()
    assert sum(counts.values()) == len(raw) and counts["damaged record"] >= 13
    (note,) = pipeline.skipped_notes(config)
    assert len(note) < 1000


def test_allow_outside_is_an_option_of_the_data(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    for i in range(3):
        (tmp_path / "elsewhere" / f"{i}.png").write_bytes(encode(plain(9)))
        (tmp_path / "folder" / f"{i}.png").symlink_to(tmp_path / "elsewhere" / f"{i}.png")
    config = DataConfig("folder", path=str(tmp_path / "folder"), image_size=8)
    with pytest.raises(ValueError, match=r"outside the folder': 3.*pass allow_outside if that is"):
        next(train(config))
    allowed = dataclasses.replace(config, allow_outside=True)
    assert (next(train(allowed))["image"] == 9).all()
    assert train(allowed).get_state()["stream"] == train(config).get_state()["stream"]


def test_reading_outside_the_folder_does_not_make_other_data():
    """Runs from before the option existed go on, and may switch it."""
    old, new = {"data": {"name": "folder"}}, {"data": {"name": "folder", "allow_outside": True}}
    check_config_change(old, new, "checkpoint")
    with pytest.raises(CheckpointError, match=r"data\.name"):
        check_config_change(old, {"data": {"name": "emoji"}}, "checkpoint")


def test_runs_from_before_limits_and_blocks_go_on():
    config = tokenizer.get_config().to_dict()
    old = {**config, "data": {k: v for k, v in config["data"].items() if f"data.{k}" not in BEFORE}}
    assert len(config["data"]) - len(old["data"]) == 7
    check_config_change(old, config, "checkpoint")
    for key in ("min_side", "shuffle_block"):
        changed = {**config, "data": {**config["data"], key: 64}}
        with pytest.raises(CheckpointError, match=rf"data\.{key}.* -> 64"):
            check_config_change(old, changed, "checkpoint")


def test_captions_of_some_length():
    texts = {"caption": "abc", "captions": ["abc", "abcdefgh", "abcde"]}
    assert fitting_captions(texts, 0, 0) is texts
    assert fitting_captions(texts, 4, 6) == {"caption": "abcde", "captions": ["abcde"]}
    assert fitting_captions({"caption": "ab"}, 1, 2) == {"caption": "ab"}
    assert fitting_captions({"tags": ["x"]}, 5, 9) == {"tags": ["x"]}
    with pytest.raises(Broken, match="caption length: 2 characters, the limits are 3 and 0"):
        fitting_captions({"caption": "ab"}, 3, 0)
