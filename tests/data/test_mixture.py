"""Mixtures: shares by weight, every example of a source once per pass, resuming, new weights."""

import collections

import numpy as np
import pytest
from config_files import tokenizer
from picture_files import encode, plain

from tokenflow_jax.data import mixture, pipeline
from tokenflow_jax.data.dealing import DealtBatches

COUNTS = {"a": 100, "b": 300, "c": 7}
WEIGHTS = (1.0, 2.0, 0.1)


def batches(weights=WEIGHTS, share=0, shares=1, batch=8, counts=COUNTS, **options):
    def make(item, rng):
        return None if item % 50 == 3 else {"item": np.int64(item), "draw": rng.random()}

    shard = {"shard_index": share, "shard_count": shares}
    return DealtBatches(
        make, counts, weights=weights, batch_size=batch // shares, seed=5, **shard, **options
    )


def items(reader, count):
    return np.concatenate([next(reader)["item"] for _ in range(count)])


def source_of(items):
    return np.searchsorted([100, 400, 407], items, side="right")


def test_shares_are_those_of_the_weights():
    plan = mixture.Plan(WEIGHTS, seed=1)
    assert sum(plan.counts) == mixture.BLOCK
    np.testing.assert_allclose(
        np.array(plan.counts) / mixture.BLOCK, np.array(WEIGHTS) / 3.1, atol=1e-3
    )
    seen = [plan.at(place) for place in range(2 * mixture.BLOCK + 77)]
    for source in range(3):
        numbers = [number for own, number in seen if own == source]
        assert numbers == list(range(len(numbers)))
        places = [place for place, (own, _) in enumerate(seen) if own == source]
        assert plan.places(source, 5, 40).tolist() == places[5:45]
    for place in (0, 1, 5000, len(seen)):
        before = collections.Counter(own for own, _ in seen[:place])
        assert plan.given(place) == [before[source] for source in range(3)]
    rare = mixture.Plan([1.0, 1e-9], seed=1)
    assert rare.counts == [mixture.BLOCK - 1, 1]
    assert mixture.Plan([1e308, 1e308], seed=1).counts == [mixture.BLOCK // 2] * 2


@pytest.mark.parametrize("block", [0, 5])
def test_every_example_of_a_source_comes_once_per_pass(block):
    found = items(batches(shuffle_block=block, shuffle_window=20), 130)
    for source, (first, count) in enumerate([(0, 100), (100, 300), (400, 7)]):
        own = found[source_of(found) == source]
        usable = [i for i in range(first, first + count) if i % 50 != 3]
        passes = len(own) // len(usable)
        if passes:
            assert collections.Counter(own[: passes * len(usable)]) == dict.fromkeys(usable, passes)
        else:
            assert len({*own}) == len(own)
    assert np.bincount(source_of(found)) / len(found) == pytest.approx(
        np.array(WEIGHTS) / 3.1, abs=0.05
    )


@pytest.mark.parametrize("block", [0, 5])
def test_shares_and_resuming_give_the_same_stream(block):
    options = {"shuffle_block": block, "shuffle_window": 20, "counts": {"a": 40, "b": 40}}
    options["weights"] = (1.0, 3.0)
    whole = items(batches(batch=6, **options), 30).reshape(30, 6)
    parts = [items(batches(share=i, shares=3, batch=6, **options), 30) for i in range(3)]
    seen = collections.Counter(np.concatenate(parts)[:90])
    assert seen.keys() <= collections.Counter(whole.ravel()).keys()
    reader = batches(batch=6, **options)
    items(reader, 11)
    state = reader.get_state()
    again = batches(batch=6, **options)
    again.set_state(state)
    np.testing.assert_array_equal(items(again, 19).reshape(19, 6), whole[11:])


def test_items_announced_are_those_that_a_share_reads():
    told = collections.defaultdict(set)
    readers = [
        batches(
            share=share, shares=2, counts={"a": 60, "b": 90}, weights=(1.0, 1.0), buffer=1,
            threads=1, shuffle_block=5, shuffle_window=30,
            will_need=lambda items, share=share: told[share].update(items.tolist()),
        )
        for share in range(2)
    ]  # fmt: skip
    for share, reader in enumerate(readers):
        assert set(items(reader, 6).tolist()) <= told[share]


def test_new_weights_go_on_from_where_the_old_ones_stopped(caplog):
    counts = {"a": 1000, "b": 1000}
    reader = batches((1.0, 1.0), counts=counts)
    before = items(reader, 25)
    again = batches((9.0, 1.0), counts=counts)
    again.set_state(reader.get_state())
    assert "weights of the mixture [1.0, 1.0] -> [9.0, 1.0]" in caplog.text
    after = items(again, 60)
    assert not {*before} & {*after}  # no example of the first pass comes again
    assert np.mean(after < 1000) == pytest.approx(0.9, abs=0.05)
    third = batches((9.0, 1.0), counts=counts)
    third.set_state(again.get_state())
    np.testing.assert_array_equal(items(third, 5), items(again, 5))
    one_of_two = batches((1.0, 1.0), share=0, shares=2, counts=counts).get_state()
    with pytest.raises(ValueError, match=r"lacks those of shares \[1\]"):
        batches((9.0, 1.0), share=0, shares=2, counts=counts).set_state(one_of_two)
    with pytest.raises(ValueError, match="sources was"):
        batches((1.0, 1.0), counts={"a": 1000, "c": 1000}).set_state(reader.get_state())


def test_lines_are_parsed_or_refused():
    known = {
        "min_side": 8,
        "flip": True,
        "captions": ("x",),
        "split": "train",
        "name": "",
        "path": "",
    }
    lines = (
        "0.7 webdataset 'a b/{0..9}.tar' min_side=64 as=laion",
        "2 emoji flip=false captions={tags}|{caption}",
    )
    first, second = mixture.parse(lines, known)
    assert (first.weight, first.name, first.path, first.label) == (
        0.7, "webdataset", "a b/{0..9}.tar", "laion",
    )  # fmt: skip
    assert first.changes == {"min_side": 64}
    assert second.label == "emoji_2"
    assert second.changes == {"flip": False, "captions": ("{tags}", "{caption}")}
    for path in ("data/year=2024/x.parquet", "year=2024/x.parquet", "gs://b/x=1/y"):
        assert mixture.parse([f"1 parquet {path}"], known)[0].path == path
    with pytest.raises(ValueError, match="5,000 sources, the limit is 2,048"):
        mixture.parse(["1 emoji"] * 5000, known)
    for line, text in {
        "1 emoji as=": "as= needs a name",
        "emoji": "write 'WEIGHT NAME PATH",
        "x emoji": "write 'WEIGHT NAME PATH",
        "0 emoji": "above 0",
        "nan emoji": "above 0",
        "1 emoji sides=3": "'sides=3' sets none of as, captions, flip, min_side, split",
        "1 emoji min_side=big": "min_side is 'big', not like 8",
        "1 emoji 'x": "write",
    }.items():
        with pytest.raises(ValueError, match=text):
            mixture.parse([line], known)
    with pytest.raises(ValueError, match="not different"):
        mixture.parse(["1 emoji as=x", "1 emoji as=x"], known)


def test_settings_of_a_config():
    data = tokenizer.get_config().data
    assert mixture.settings(data) == {"": (1.0, data)}
    data.mixture = ("1 folder DIR min_side=32", "3 emoji as=faces")
    with pytest.raises(ValueError, match="go together"):
        mixture.settings(data)
    data.name = "mixture"
    found = mixture.settings(data)
    assert list(found) == ["folder_1", "faces"]
    (weight, folder), (_, emoji) = found.values()
    assert (weight, folder.name, folder.path, folder.min_side) == (1.0, "folder", "DIR", 32)
    assert (emoji.name, emoji.min_side, emoji.flip) == ("emoji", data.min_side, data.flip)


def test_pictures_of_several_sources_in_one_batch(tmp_path):
    for name, values in (("a", range(5)), ("b", range(100, 130))):
        (tmp_path / name / "x").mkdir(parents=True)
        for value in values:
            (tmp_path / name / "x" / f"{value}.png").write_bytes(encode(plain(value)))
    configs = {
        name: pipeline.DataConfig("folder", str(tmp_path / name), "all", 8, "center", flip=False)
        for name in ("a", "b")
    }
    reader = pipeline.mixed_batches(configs, (1.0, 3.0), batch_size=10, seed=0)
    found = [next(reader) for _ in range(20)]
    value = np.concatenate([batch["image"][:, 0, 0, 0] for batch in found])
    source = np.concatenate([batch["source"] for batch in found])
    np.testing.assert_array_equal(source, value >= 100)
    assert source.mean() == pytest.approx(0.75, abs=0.08)
    assert {"image", "label", "source"} == found[0].keys()
