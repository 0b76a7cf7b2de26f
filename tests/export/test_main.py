"""`python -m tokenflow_jax.export`: folders, and one line for what does not fit."""

import dataclasses
import importlib.util
import json
import tarfile

import jax
import numpy as np
import pytest
import tiny

import tokenflow_jax as tfx
from tokenflow_jax.export import programs
from tokenflow_jax.export.__main__ import run
from tokenflow_jax.tokenizer.kinds import QuantizerConfig
from tokenflow_jax.weights.formats import orbax
from tokenflow_jax.weights.lazy import in_memory

SEPARATE = dataclasses.replace(tiny.TINY, quantizer=QuantizerConfig(mapping="separate"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers, and what looks like a runtime."""
    folder = tmp_path_factory.mktemp("export")
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_tokenizer(folder / "separate", SEPARATE)
    record = {"stage": "generation", "model": {}}
    weight = {"params/x": in_memory("x", np.zeros(2, np.float32))}
    orbax.save_weights(folder / "language_model", weight, record, {"weights": "raw"})
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        path = folder / "package" / "dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "empty").mkdir()
    with tarfile.open(folder / "empty.tgz", "w:gz") as archive:
        archive.add(folder / "empty", "package")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_stablehlo_folder(folder, capsys):
    pytest.importorskip("flatbuffers")
    flags = ("--to=stablehlo", "--checkpoint=tokenizer", "--out=made")
    assert run(flags) == 0, capsys.readouterr().err
    tokenizer = tfx.Tokenizer.load("tokenizer")
    about = json.loads((folder / "made" / "tokenizer.json").read_text())
    assert about["fingerprint"] == tokenizer.fingerprint and about["batch_size"] is None
    for name, last in (("encode", 21), ("decode", 3), ("features", 9)):
        program = jax.export.deserialize((folder / "made" / f"{name}.stablehlo").read_bytes())
        assert program.out_avals[0].shape[-1] == last
    assert run(flags) == 2 and "made exists; give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to=stablehlo"], "missing --out"),
        (["--to=stablehlo", "--checkpoint=none", "--out=x"], "none"),
        (
            ["--to=stablehlo", "--checkpoint=language_model", "--out=x"],
            "language_model is a checkpoint of stage 'generation', not of 'tokenizer'",
        ),
        (["--to=web", "--checkpoint=tokenizer", "--out=x"], "needs --runtime"),
        (["--to=web", "--checkpoint=tokenizer", "--out=x", "--runtime=none.tgz"], "`npm pack"),
        (["--to=web", "--checkpoint=tokenizer", "--out=x", "--runtime=empty"], "`npm pack"),
        (["--to=web", "--checkpoint=tokenizer", "--out=x", "--runtime=empty.tgz"], "`npm pack"),
        (
            ["--to=web", "--checkpoint=separate", "--out=x", "--runtime=package"],
            "mapping 'separate' and heads 1: take --to=onnx or stablehlo",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(programs, "require", lambda *_: None)
    assert run(flags) == 2
    out, text = capsys.readouterr()
    assert not out and text.startswith("export: ") and message in text and text.count("\n") == 1
    assert not (folder / "x").exists()


def test_a_missing_package_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jax2onnx" else find(name)
    )
    assert run(["--to=onnx", "--checkpoint=tokenizer", "--out=x"]) == 2
    assert "--no-deps jax2onnx==" in capsys.readouterr().err
