"""Models that come with the package, loaded by their names."""

import json
import os

import ml_collections
import numpy as np
import pytest

import tokenflow_jax as tfx
from tokenflow_jax import convert, shipped
from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.tokenizer import frozen, loading
from tokenflow_jax.unified import start


@pytest.fixture(scope="module")
def emoji():
    return tfx.Tokenizer.load("emoji")


def test_a_name_means_the_model_in_the_package(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shipped.FOLDER / "emoji"
    assert shipped.names() == ["emoji"] and shipped.resolved("emoji") == str(folder)
    assert start.stage_of("emoji") == json.loads((folder / "config.json").read_text())[
        "tokenflow_jax"]["stage"]  # fmt: skip
    named = ml_collections.ConfigDict({"path": "emoji", "variant": ""})
    assert frozen.find_config(named) == emoji.config
    found = loading.find_tokenizer(str(tmp_path), {"path": "emoji", **emoji.identity})
    assert found.fingerprint == emoji.fingerprint
    command = ["--part=tokenizer", "--src=emoji", "--dst=a.safetensors", "--to=torch"]
    assert convert.run(command) == 0
    assert tfx.Tokenizer.load("a.safetensors").fingerprint == emoji.fingerprint


def test_another_name_is_told_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"emojis holds no checkpoint; .*with the package: emoji"):
        tfx.Tokenizer.load("emojis")


def test_what_lies_here_comes_first_and_the_package_is_never_written(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shipped.FOLDER.rglob("*")}
    emoji.save_pretrained("emoji")
    assert shipped.resolved("emoji") == "emoji" and os.path.isfile("emoji/model.safetensors")
    (tmp_path / "emoji" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="safetensors"):
        tfx.Tokenizer.load("emoji")
    assert {path: path.stat().st_mtime_ns for path in shipped.FOLDER.rglob("*")} == before


def test_they_are_small_and_have_cards():
    """24 MB in all; weights are float16, and each card says how it was trained."""
    sizes = [path.stat().st_size for path in shipped.FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 24e6
    for name in shipped.names():
        for inside, figure in (("", "exact_match"), ("tokenizer", "psnr")):
            card = (shipped.FOLDER / name / inside / "README.md").read_text()
            assert f'from_pretrained("{name}")' in card and "| seed |" in card and figure in card


def test_held_out_emoji_come_back(emoji):
    """As well as the card says: decibels over all held-out pictures, as evaluation counts."""
    held_out = Pictures(
        DataConfig("emoji", "", "heldout", emoji.config.image_size, "center", flip=False)
    )
    images = np.stack([held_out[i]["image"] for i in range(len(held_out))])
    made = np.stack([np.asarray(one) for one in emoji.reconstruct(list(images))])
    errors = np.square(images.astype(float) - made).mean((1, 2, 3))
    decibels = (10 * np.log10(255**2 / errors)).mean()
    card = (shipped.FOLDER / "emoji" / "tokenizer" / "README.md").read_text()
    told = float(card.split("| psnr | ")[1].split(" ")[0])
    assert decibels == pytest.approx(told, abs=0.1) and told > 24
