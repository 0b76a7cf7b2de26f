"""Data sets of codes: written in parts, continued after a kill, refused with another tokenizer."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny as tiny_config
from absl import flags
from PIL import Image

import tokenflow_jax as tfx
from tokenflow_jax import cli, encode, log, remote
from tokenflow_jax.data import pipeline, records, sources
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.captions import codes
from tokenflow_jax.data.text import PromptEncoder
from tokenflow_jax.tokenizer import encoding

TINY = tiny_config.TINY
PROMPTS = PromptEncoder(ByteTokenizer(), 48)


def tokenizer_of(seed, config=TINY):
    return tfx.Tokenizer(config, tiny_config.random_params(config, seed))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures, of which one is broken, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(11):
        picture = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}))
    (folder / "4.png").write_text("broken")
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def pictures(folder):
    config = pipeline.DataConfig("jsonl", path=str(folder), split="all", image_size=16)
    return {"train": captions.Pictures(config)}


def write(tokenizer, folder, out, **options):
    options = {"source": "test", "batch_size": 4, "records_per_file": 3, **options}
    return encode.encode(tokenizer, pictures(folder), out, **options)


def test_codes_are_the_tokenizer_s(tokenizer, folder, tmp_path):
    assert write(tokenizer, folder, tmp_path / "c")
    read = codes.CodeRecords(str(tmp_path / "c"), "train", tokenizer.identity)
    assert len(read) == 10
    source = sources.JsonlSource(folder)
    images = {source[i]["name"]: i for i in range(11) if i != 4}
    data = pictures(folder)["train"]
    for i in range(10):
        example = read[i]
        picture = data[images[example["name"]]]["image"]
        np.testing.assert_array_equal(example["codes"], tokenizer.encode(picture[None])[0])
        assert example["caption"] == f"picture {example['name'].split('.')[0]}"
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == [
        "dataset.json", "encoding.json", *(f"train-0000{i}-of-00004.array_record" for i in range(4))
    ]  # fmt: skip


def test_a_killed_command_continues(tokenizer, folder, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "c", encoding.encode_pictures, []

    def dies_in_the_third_part(*arguments):
        calls.append(1)
        for i, row in enumerate(real(*arguments)):
            if len(calls) == 3 and i == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(encoding, "encode_pictures", dies_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        write(tokenizer, folder, out)
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    assert len(there) == 2
    with pytest.raises(codes.CodesError, match="not a finished data set of codes; run the same"):
        codes.read_about(out)
    monkeypatch.setattr(encoding, "encode_pictures", real)
    assert write(tokenizer, folder, out)
    assert len(calls) == 3  # the finished parts were left alone
    assert all((out / name).stat().st_mtime_ns == time for name, time in there.items())
    assert write(tokenizer, folder, tmp_path / "whole")
    for file in out.glob("*.array_record"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_progress_is_that_of_all_parts(tokenizer, folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "_PROGRESS_S", -1.0)
    assert write(tokenizer, folder, tmp_path / "c")
    lines = [text for text in caplog.messages if text.startswith("encode: ")]
    assert len(lines) == 1  # the first of three batches compiles, and the last is the end
    assert re.fullmatch(r"encode: 8 of 11, [\d.]+ images/s, eta \w+", lines[0])


def test_hosts_share_the_parts(tokenizer, folder, tmp_path):
    out = tmp_path / "c"
    assert not write(tokenizer, folder, out, shard_index=1, shard_count=2)
    assert {p.name[:11] for p in out.glob("*.array_record")} == {"train-00001", "train-00003"}
    assert write(tokenizer, folder, out, shard_index=0, shard_count=2)
    write(tokenizer, folder, tmp_path / "whole")
    manifests = [(d / "dataset.json").read_bytes() for d in (out, tmp_path / "whole")]
    assert manifests[0] == manifests[1]


def test_another_tokenizer_is_refused(tokenizer, folder, tmp_path):
    write(tokenizer, folder, tmp_path / "c")
    other = tokenizer_of(1)
    with pytest.raises(codes.CodesError, match="made by another tokenizer: their fingerprint"):
        codes.CodeRecords(str(tmp_path / "c"), "train", other.identity)
    smaller = tokenizer_of(0, dataclasses.replace(TINY, codebook_size=16))
    with pytest.raises(codes.CodesError, match="codebook_size 32 there, 16 here"):
        codes.CodeRecords(str(tmp_path / "c"), "train", smaller.identity)
    with pytest.raises(codes.CodesError, match="was started with other settings: tokenizer was"):
        write(other, folder, tmp_path / "c")


def test_fingerprint_is_of_the_codes_alone(tokenizer):
    same = tokenizer_of(0)
    assert tokenizer.fingerprint == same.fingerprint and len(same.fingerprint) == 16
    decoder = {**tokenizer.params, "pixel_decoder": tokenizer_of(1).params["pixel_decoder"]}
    assert dataclasses.replace(tokenizer, params=decoder).fingerprint == tokenizer.fingerprint
    book = {**tokenizer.params, "pixel_codebook": tokenizer.params["pixel_codebook"] * 1.001}
    assert dataclasses.replace(tokenizer, params=book).fingerprint != tokenizer.fingerprint
    weighed = dataclasses.replace(TINY, pixel_weight=2.0)
    assert dataclasses.replace(tokenizer, config=weighed).fingerprint != tokenizer.fingerprint


def test_the_fingerprint_does_not_change_between_versions():
    """Data sets on disk carry it: a change here makes them unreadable."""
    params = {name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in (
        "semantic_codebook", "pixel_codebook", "pixel_decoder")}  # fmt: skip
    assert tfx.Tokenizer(TINY, params).fingerprint == "2ad381adfce65c62"


def test_pictures_are_not_codes(tokenizer, tmp_path):
    with records.DatasetWriter(tmp_path / "p") as writer:
        writer.write("train", {"name": "x", "image": np.zeros((16, 16, 3), np.uint8)})
    with pytest.raises(codes.CodesError, match="holds pictures, not codes"):
        codes.CodeRecords(str(tmp_path / "p"), "train", tokenizer.identity)
    with pytest.raises(codes.CodesError, match="holds another data set"):
        codes.PartWriter(tmp_path / "p", {}, {"train": 1})
    with pytest.raises(codes.CodesError, match="is not a data set of codes; write one with"):
        codes.CodeRecords(str(tmp_path / "no"), "train", tokenizer.identity)


def test_damaged_records_are_skipped_and_counted(tokenizer, tmp_path):
    writer = codes.PartWriter(tmp_path / "c", {"tokenizer": tokenizer.identity}, {"train": 4})
    ((_, _, file),) = writer.mine()
    length = TINY.pyramid.tokens
    rows = [
        {"name": "good", "caption": "x", "codes": np.arange(length)},
        {"name": "short", "caption": "x", "codes": np.arange(length - 1)},
        {"name": "beyond", "caption": "x", "codes": np.full(length, 32)},
        {"name": "mute", "codes": np.arange(length)},
    ]
    writer.write(file, rows)
    assert writer.finish()
    read = codes.CodeRecords(str(tmp_path / "c"), "train", tokenizer.identity)
    batches = captions.train_batches(read, captions.CaptionConfig(), PROMPTS, batch_size=2, seed=0)
    for _ in range(4):
        batch = next(batches)
        assert (batch["codes"] == np.arange(length)).all() and batch["codes"].dtype == np.int32
    assert read.skipped.counts() == {"damaged record": 2, "no caption": 1}


@pytest.mark.parametrize("largest,kind", [(65_535, "<u2"), (65_536, "<i4")])
def test_large_codebooks_keep_their_codes(largest, kind):
    record = records.pack({"name": "x", "codes": np.array([0, largest])})
    assert f'"codes":"{kind}"'.encode() in record
    np.testing.assert_array_equal(records.unpack(record)["codes"], [0, largest])


def test_codes_in_memory(tokenizer, folder):
    encoder = encoding.image_encoder(tokenizer)
    examples = encoding.encode_in_memory(encoder, pictures(folder)["train"], 4)
    assert len(examples) == 11 and examples[4] is None
    assert examples.skipped.counts() == {"not an image": 1}
    seen = list(captions.eval_batches(examples, PROMPTS, batch_size=4))
    assert sum(b["mask"].sum() for b in seen) == 10
    picture = pictures(folder)["train"][7]["image"]
    np.testing.assert_array_equal(examples[7]["codes"], tokenizer.encode(picture[None])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing --checkpoint and --out"),
        (("--checkpoint=x", "--out=y", "--shard_index=0"), "go together"),
    ],
)
def test_wrong_flags_are_one_clear_message(arguments, message):
    options = flags.FlagValues()
    encode.define_flags(cli.Define(options))
    options(["encode", *arguments])
    with pytest.raises(ValueError, match=message):
        encode.main(options)


def test_a_plan_that_is_no_json_is_named(tmp_path):
    codes.PartWriter(tmp_path / "c", {}, {"train": 1})
    (tmp_path / "c" / "encoding.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"encoding\.json is not JSON.*choose another folder"):
        codes.PartWriter(tmp_path / "c", {}, {"train": 1})


def test_the_folder_is_tried_before_the_tokenizer_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfx.Tokenizer, "load", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("in the way")
    options = flags.FlagValues()
    encode.define_flags(cli.Define(options))
    options(["encode", "--checkpoint=x", f"--out={tmp_path / 'file' / 'out'}"])
    with pytest.raises(OSError, match="cannot write into the folder"):
        encode.main(options)


def test_codes_in_a_bucket_that_are_not_finished_are_named(bucket):
    remote.write(f"{bucket}/codes/{codes.PLAN}", b"{}")
    with pytest.raises(codes.CodesError, match="not a finished data set of codes"):
        codes.read_about(f"{bucket}/codes")
