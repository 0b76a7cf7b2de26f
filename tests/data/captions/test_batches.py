"""Captions with their pictures: draws, order, hosts, and pairs that are left out."""

import json

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax.data import pipeline, prepare, sources
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.captions.texts import CaptionConfig
from tokenflow_jax.data.text import PromptEncoder

PROMPTS = PromptEncoder(ByteTokenizer(), 48)
VARIED = CaptionConfig(("{caption}", "{caption}, {tags}", "{tags}", "{group}: {caption}"))
PLAIN = CaptionConfig()


@pytest.fixture
def emoji():
    return Pictures(pipeline.DataConfig("emoji", image_size=16, augment="center", flip=False))


def jsonl(folder, count=7, extra=()):
    """Pictures of one color, 10 i, whose caption is the number i after a Russian word."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encode(plain(10 * i % 256)))
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"число {i}"}, ensure_ascii=False))
    (folder / "captions.jsonl").write_text("\n".join([*lines, *extra]) + "\n", encoding="utf-8")
    return Pictures(pipeline.DataConfig("jsonl", path=str(folder), image_size=8, augment="center"))


def decode(prefix_P):
    text = PROMPTS.text_tokenizer.decode(prefix_P, skip_special_tokens=True)
    return text.removesuffix("<img>")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def train(examples, config=PLAIN, **options):
    options = {"batch_size": 4, "seed": 0, **options}
    return captions.train_batches(examples, config, PROMPTS, **options)


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        for key in one.keys() | other.keys():
            np.testing.assert_array_equal(one[key], other[key])


def test_caption_belongs_to_its_picture(tmp_path):
    for batch in take(train(jsonl(tmp_path / "d")), 5):
        assert batch["image"].dtype == np.uint8 and batch["prefix"].dtype == np.int32
        values = [f"число {v // 10}" for v in batch["image"][:, 0, 0, 0]]
        assert [decode(p) for p in batch["prefix"]] == values


def test_order_captions_and_drops_depend_on_the_seed_alone(emoji):
    config = CaptionConfig(VARIED.templates, drop_rate=0.3)
    first = take(train(emoji, config), 3)
    assert_same(first, take(train(emoji, config, threads=5), 3))
    assert (first[0]["prefix"] != next(train(emoji, config, seed=1))["prefix"]).any()
    texts = [decode(p) for batch in first for p in batch["prefix"]]
    assert 0 < texts.count("") < 12


def test_resume_is_exact(emoji):
    config = CaptionConfig(VARIED.templates, drop_rate=0.3)
    whole = train(emoji, config)
    take(whole, 3)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = train(emoji, config)
    resumed.set_state(state)
    assert_same(take(resumed, 3), take(whole, 3))
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        train(emoji, config, seed=1).set_state(state)


def test_hosts_share_one_stream(emoji):
    whole = take(train(emoji, VARIED, batch_size=6), 2)
    hosts = [
        train(emoji, VARIED, batch_size=2, shard_index=i, shard_count=3) for i in range(3)
    ]  # fmt: skip
    for batch in whole:
        shares = [next(host) for host in hosts]
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([s[key] for s in shares]), batch[key])


def test_hostile_lines_are_skipped_named_and_counted(tmp_path, write_broken):
    (tmp_path / "d").mkdir()
    write_broken(tmp_path / "d")
    extra = (
        '{"image": "truncated.jpg", "caption": "half"}',
        '{"image": "missing.png", "caption": "none"}',
        '{"image": "0.png"}',
        '{"caption": "no picture"}',
        "not json",
        '["a list"]',
        '{"image": "a\\u0000b", "caption": "zero"}',
    )
    examples = jsonl(tmp_path / "d", extra=extra)
    assert len(examples) == 14
    seen = {decode(p) for batch in take(train(examples), 8) for p in batch["prefix"]}
    assert seen == {f"число {i}" for i in range(7)}
    counts = examples.skipped.counts()
    assert counts == {
        "damaged": 1, "cannot be read": 2, "no caption": 1, "line without image": 1,
        "damaged line": 2,
    }  # fmt: skip
    (note,) = captions.skipped_notes(examples, examples)
    assert "skipped 7 of 14" in note


def test_nothing_usable_is_an_error_not_a_silent_loop(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(plain(i)))
    config = pipeline.DataConfig("folder", path=str(tmp_path), image_size=8)
    with pytest.raises(ValueError, match=r"no usable pair(.|\n)*'no caption': \d"):
        next(train(Pictures(config)))


@pytest.mark.parametrize("shards", [1, 2])
def test_evaluation_sees_every_pair_once(tmp_path, shards):
    examples = jsonl(tmp_path / "d", extra=('{"image": "0.png"}',))
    seen = []
    for shard in range(shards):
        for batch in captions.eval_batches(
            examples, PROMPTS, batch_size=3, shard_index=shard, shard_count=shards
        ):
            assert batch["image"].shape == (3, 8, 8, 3)
            for i in np.flatnonzero(batch["mask"]):
                index = batch["index"][i]
                assert decode(batch["prefix"][i]) == f"число {index}"
                assert (batch["image"][i] == 10 * index).all()
                seen.append(int(index))
            for i in np.flatnonzero(~batch["mask"]):
                assert batch["index"][i] == -1 and decode(batch["prefix"][i]) == ""
    assert sorted(seen) == list(range(7))


def test_evaluation_uses_main_captions(emoji):
    (first, *_) = captions.eval_batches(emoji, PROMPTS, batch_size=5, limit=5)
    texts = captions.captions_of(emoji, first["index"])
    assert [decode(p) for p in first["prefix"]] == texts
    source = sources.EmojiSource("train")
    assert texts == [source[int(i)]["caption"] for i in first["index"]]


def test_captions_survive_preparation(tmp_path):
    jsonl(tmp_path / "d", count=120)
    lines = ['{"file_name": "0.png", "text": ["один", "uno"], "tags": ["x"]}', "broken"]
    with (tmp_path / "d" / "captions.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines))
    arguments = ("jsonl", f"--src={tmp_path / 'd'}", f"--dst={tmp_path / 'out'}")
    assert prepare.run(arguments) == 0
    read = {}
    for split in ("train", "heldout"):
        source = sources.open_source("array_record", str(tmp_path / "out"), split)
        for example in (source[i] for i in range(len(source))):
            assert sources.is_heldout(example["name"]) == (split == "heldout")
            read.setdefault(example["name"], []).append((split, example))
    assert len(read) == 120
    (_, first), (_, again) = read["0.png"]
    assert first["caption"] == "число 0"
    assert (again["caption"], again["captions"], again["tags"]) == ("один", ["один", "uno"], ["x"])


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("no", "train", "neither a .jsonl file nor a folder"),
        ("", "train", "neither a .jsonl file nor a folder"),
        ("d", "odd", "no split 'odd'"),
    ],
)
def test_wrong_paths(tmp_path, path, split, message):
    jsonl(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        sources.open_source("jsonl", str(tmp_path / path) if path else "", split)


def test_an_image_folder_elsewhere_and_byte_order_marks(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "é.png").write_bytes(encode(plain(5)))
    file = tmp_path / "c.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"image": "é.png", "label": "ü"}\n'.encode())
    source = sources.open_source("jsonl", str(file), "train", str(tmp_path / "pictures"))
    assert source[0]["caption"] == "ü" and source[0]["name"] == "é.png"
    with pytest.raises(ValueError, match=r"image_folder .* is not a folder"):
        sources.open_source("jsonl", str(file), "train", str(tmp_path / "no"))


def test_captions_that_vanish_later_end_the_training(tmp_path):
    examples = jsonl(tmp_path / "d")
    examples.decoded._room = -1  # as for a data set that does not fit
    batches = train(examples)
    take(batches, 9)
    for path in (tmp_path / "d").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no usable picture among the 7.*cannot be read': 7"):
        take(batches, 500)


def test_an_evaluation_without_one_caption_is_an_error(tmp_path):
    examples = jsonl(tmp_path / "d", 0, [json.dumps({"image": "x.png"})])
    (tmp_path / "d" / "x.png").write_bytes(encode(plain(1)))
    with pytest.raises(ValueError, match=r"no usable pair of picture and caption.*'no caption': 1"):
        list(captions.eval_batches(examples, PROMPTS, batch_size=2))


def test_wrong_captions_and_names_are_skipped(tmp_path):
    odd = [
        json.dumps({"image": "0.png", "caption": "half of a pair \ud83d"}),
        json.dumps({"image": "a\ud83d.png", "caption": "x"}),
        json.dumps({"image": "../d/0.png", "caption": "x"}),
        json.dumps({"image": "/dev/zero", "caption": "y"}),
        json.dumps({"image": {"path": "0.png"}, "caption": "z"}),
        '{"image": "0.png", "caption": "digits", "n": ' + "9" * 5000 + "}",
    ]
    examples = jsonl(tmp_path / "d", extra=odd)
    seen = {decode(p) for batch in take(train(examples), 9) for p in batch["prefix"]}
    # "../d/0.png" leads back into the folder.
    assert seen == {*(f"число {i}" for i in range(7)), "x"}
    assert examples.skipped.counts() == {
        "not text": 1, "cannot be read": 1, "outside the folder": 1, "line without image": 1,
        "damaged line": 1,
    }  # fmt: skip


def test_captions_in_a_json_array(tmp_path):
    lines = jsonl(tmp_path / "d")
    rows = (tmp_path / "d" / "captions.jsonl").read_text().splitlines()
    (tmp_path / "d" / "array.json").write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")
    config = pipeline.DataConfig("jsonl", path=str(tmp_path / "d" / "array.json"), image_size=8)
    array = Pictures(config)
    assert [array[i]["caption"] for i in range(7)] == [lines[i]["caption"] for i in range(7)]
