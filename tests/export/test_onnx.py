"""ONNX files in onnxruntime: the tokenizer's codes, metadata, weights that fit float16."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import tokenflow_jax as tfx
from tokenflow_jax.export import onnx, programs

for name in ("jax2onnx", "onnx", "onnxruntime"):
    pytest.importorskip(name)


@pytest.fixture(scope="module", params=["float32", "float16"])
def exported(request, tmp_path_factory):
    """A tokenizer whose weights are numbers of that type, and the folder of its programs."""
    params = tiny.random_params(tiny.TINY, 0)
    params = jax.tree.map(lambda x: x.astype(request.param).astype(np.float32), params)
    tokenizer = tfx.Tokenizer(tiny.TINY, params)
    folder = tmp_path_factory.mktemp(request.param)
    for program in programs.programs(tokenizer)[:2]:
        model = onnx.convert(program, 2, programs.describe(tokenizer, 2))
        onnx.write(model, folder / f"{program.name}.onnx")
    return tokenizer, folder


def test_codes_and_pixels_are_the_tokenizer_s(exported):
    tokenizer, folder = exported
    images = list(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8))
    found = onnx.check(folder, tokenizer, images, 2)
    assert (found.equal, found.count, found.codes) == (4, 4, 0)
    assert found.pixels < 1e-5


def test_nothing_is_said_about_examples_whose_packages_are_missing():
    command = "from tokenflow_jax.export import onnx, programs; import tiny, tokenflow_jax as tfx; "
    command += "tokenizer = tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 0)); "
    command += "onnx.convert(programs.programs(tokenizer)[1], 1, {})"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "Skipping" not in found.stderr and "Traceback" not in found.stderr


def test_the_check_notices_another_tokenizer(exported):
    _, folder = exported
    other = tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 1))
    images = list(np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8))
    found = onnx.check(folder, other, images, 2)
    assert found.equal == 0 and found.codes > 0 and found.pixels > 1e-2


def test_a_file_says_what_it_is(exported):
    import onnxruntime

    tokenizer, folder = exported
    session = onnxruntime.InferenceSession(folder / "encode.onnx")
    (images,), (codes,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", [2, 16, 16, 3])
    assert (codes.name, codes.type, codes.shape) == ("codes", "tensor(int32)", [2, 21])
    about = session.get_modelmeta().custom_metadata_map
    assert about["fingerprint"] == tokenizer.fingerprint
    assert json.loads(about["scales"]) == [1, 2, 4]


def test_float16_weights_are_kept_as_such(exported):
    import onnx as library

    _, folder = exported
    weights = library.load(folder / "encode.onnx").graph.initializer
    large = [w for w in weights if np.prod(w.dims) >= 256 and w.data_type in (1, 10)]
    halves = [w for w in large if w.data_type == 10]
    assert len(large) > 3
    assert len(halves) == (len(large) if folder.name.startswith("float16") else 0)


def test_large_models_have_their_weights_beside_them(exported, tmp_path, monkeypatch):
    import onnx as library

    tokenizer, folder = exported
    monkeypatch.setattr(onnx, "_LARGE", 1000)
    for name in ("encode", "decode"):
        onnx.write(library.load(folder / f"{name}.onnx"), tmp_path / f"{name}.onnx")
        small, large = (tmp_path / f"{name}.onnx{end}" for end in ("", ".data"))
        assert small.stat().st_size < (folder / small.name).stat().st_size
        assert large.stat().st_size > 1000
    images = list(np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8))
    assert onnx.check(tmp_path, tokenizer, images, 2).equal == 2
