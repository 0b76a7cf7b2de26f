"""The released layout of an understanding model, both ways, and its tokenizer's fingerprint."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from tokenflow_jax import convert as command
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer import api
from tokenflow_jax.understanding.folder import (
    read_understanding_config,
    save_understanding_model,
)
from tokenflow_jax.understanding.model import UnderstandingConfig
from tokenflow_jax.understanding.names import PART, understanding_template
from tokenflow_jax.weights import conversion, rules

CONFIG = UnderstandingConfig(
    LMConfig(
        vocabulary_size=50, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, qkv_bias=True
    ),
    vision_channels=9,
)

RELEASED = {
    "model_type": "llava_qwen2", "vocab_size": 152064, "hidden_size": 5120,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "intermediate_size": 13824, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
    "mm_hidden_size": 40, "mm_projector_type": "mlp2x_gelu",
}  # fmt: skip


def parameters(config):
    rng = np.random.default_rng(0)
    shapes = understanding_template(config)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def same(a, b):
    a, b = rules.flatten(a), rules.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_a_folder_survives_the_round_trip(tmp_path, projector):
    """Sharded, through our format, and into a folder again: bit for bit, fingerprint included."""
    config = dataclasses.replace(CONFIG, projector=projector)
    params = parameters(config)
    folder, ours, again = tmp_path / "released", tmp_path / "ours", tmp_path / "again"
    save_understanding_model(folder, config, params, fingerprint="abc", shard_bytes=8000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    projector_names = {n for n in names if "mm_projector" in n}
    assert projector_names == (
        {"model.mm_projector.weight", "model.mm_projector.bias"} if projector == "linear"
        else {f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    )  # fmt: skip
    run = ["--part=understanding", f"--src={folder}", f"--dst={ours}", "--to=orbax"]
    assert command.run(run) == 0
    source = conversion.open_source(ours, PART)
    assert source.config == config
    same(rules.unflatten({n: t.read() for n, t in source.arrays.items()}), params)
    run = ["--part=understanding", f"--src={ours}", f"--dst={again}", "--to=torch"]
    assert command.run(run) == 0
    config_again, fields = read_understanding_config(again)
    assert config_again == config and fields["tokenflow_fingerprint"] == "abc"
    source = conversion.open_source(again, PART, config)
    same(rules.unflatten({n: t.read() for n, t in source.arrays.items()}), params)


def test_a_folder_is_tied_to_a_tokenizer(tmp_path, capsys):
    """Conversion notes the given image tokenizer and the folder with the text tokenizer."""
    folder, ours = tmp_path / "released", tmp_path / "ours"
    save_understanding_model(folder, CONFIG, parameters(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer")
    run = ["--part=understanding", f"--src={folder}", f"--dst={ours}", "--to=orbax"]
    assert command.run([*run, "--tokenizer=b.pt"]) == 2
    assert "--tokenizer_variant=one of" in capsys.readouterr().err
    assert command.run([*run, f"--tokenizer={tokenizer}"]) == 0
    saved = conversion.open_source(ours, PART).saved
    assert saved["tokenizer"] == {
        "path": str(tokenizer), "variant": "",
        "fingerprint": api.Tokenizer.load(tokenizer).fingerprint,
    }  # fmt: skip
    assert saved["text_tokenizer"] == str(folder) and "data" not in saved
    wrong = ["--part=tokenizer", f"--src={tokenizer}", f"--dst={tmp_path / 'x'}", "--to=orbax"]
    file = ["--part=understanding", f"--src={ours}", f"--dst={tmp_path / 'x.pt'}", "--to=torch"]
    for run in (wrong, file):
        capsys.readouterr()
        assert command.run([*run, f"--tokenizer={tokenizer}"]) == 2
        assert "nothing there can note it" in capsys.readouterr().err


def test_the_released_config():
    """The expected config.json of the released folder gives the paper's variant."""
    assert _read(RELEASED) == PART.variants["qwen2_5_14b"]


def _read(fields):
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(fields))
        return read_understanding_config(folder)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_hidden_size", "abc"),
        ("mm_hidden_size", None),
        ("mm_hidden_size", 2**70),
        ("mm_projector_type", ["\x1b"] * 10**5),
        ("tokenflow_strategy", {}),
        ("model_type", [1] * 10**5),
    ],
)
def test_values_of_wrong_types_are_named(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {name: value}))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_understanding_config(tmp_path)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


def test_a_missing_tensor_is_named(tmp_path, capsys):
    params = parameters(CONFIG)
    folder = tmp_path / "released"
    save_understanding_model(folder, CONFIG, params)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 4}))
    run = ["--part=understanding", f"--src={folder}", f"--dst={tmp_path / 'x'}", "--to=orbax"]
    assert command.run(run) == 2
    assert "model.layers.3" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="projector/fc2/bias"):
        save_understanding_model(
            tmp_path / "y", dataclasses.replace(CONFIG, projector="linear"), params
        )
