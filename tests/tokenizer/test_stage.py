"""The stage around the step: starts, fine-tuning, evaluation, grids, on a shrunken quickstart."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny
from config_files import tokenizer as configs
from PIL import Image
from tiny_runs import TINY
from tiny_runs import tokenizer_config as tiny_config

import tokenflow_jax as tfx
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.evaluate import Evaluation
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.stage import TokenizerStage
from tokenflow_jax.train import curves, loop
from tokenflow_jax.train.checkpoint import CheckpointError
from tokenflow_jax.weights.conversion import convert


def make(config):
    return TokenizerStage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1])).open()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(**{"eval.knn_label": "group", "data.split": "heldout"})
    return workdir, loop.train_and_evaluate(config, workdir, make(config)).state


def test_a_run_leaves_what_people_look_for(trained):
    workdir, state = trained
    assert int(state.step) == 4
    names = {path.name for path in (workdir / "images").iterdir()}
    assert {"reconstruction_0000004.png", "scales_0000004.png"} <= names
    report = (workdir / "report.html").read_text()
    assert "knn_semantic" in report and "WITHOUT the perceptual loss" in report
    history = (workdir / "metrics.jsonl").read_text()
    for name in ("eval/psnr", "eval/knn_pixel", "usage/scale_2", "loss/codebook"):
        assert name in history
    assert any((workdir / "tensorboard").iterdir())


def test_the_api_loads_the_run(trained):
    workdir, state = trained
    tokenizer = tfx.Tokenizer.load(workdir)
    assert tokenizer.config == TINY
    expected = state.params["pixel_codebook"]
    np.testing.assert_array_equal(tokenizer.params["pixel_codebook"], expected)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    assert tokenizer.decode(tokenizer.encode(images)).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="does not hold variant 'b'"):
        tfx.Tokenizer.load(workdir, variant="b")


def _flat(params):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.slow
def test_fine_tuning_a_fresh_wider_decoder(tmp_path):
    """The enhanced decoder's recipe: other shapes start afresh, the rest is taken over."""
    config = tiny_config(**{"model.decoder_channels": 8, "model.decoder_blocks": 2})
    config.init_from = str(tiny.write_tokenizer(tmp_path / "source", TINY))
    config.reinitialize = config.trainable = ("pixel_decoder",)
    stage = make(config)
    start, text = stage.warm_start(stage.init())
    assert "except pixel_decoder from scratch" in text
    before, source = _flat(start.params), _flat(tiny.random_params(TINY, 0))
    taken = [name for name in before if "pixel_decoder" not in name]
    for name in taken:
        np.testing.assert_array_equal(before[name], source[name])
    batch = jax.device_put({"image": next(stage.data())["image"]}, stage.batch_sharding)
    before = jax.tree.map(np.asarray, before)
    after, _ = stage.step(start, batch)
    after = _flat(after.params)
    assert all(np.array_equal(before[name], after[name]) for name in taken)
    assert any(not np.array_equal(before[n], after[n]) for n in before if n not in taken)


def test_a_source_that_does_not_fit_lists_everything(trained):
    config = tiny_config(**{"model.decoder_channels": 8})
    config.init_from = str(trained[0])
    stage = make(config)
    with pytest.raises(ValueError, match=r"reinitialize(.|\n)*pixel_decoder/conv_in/kernel is"):
        stage.warm_start(stage.init())


def test_the_encoder_starts_as_the_shipped_teacher():
    config = configs.get_config()
    stage = make(config)
    state = stage.init()
    teacher = _flat(stage.frozen["teacher"])
    for name, value in _flat(state.params["semantic_encoder"]).items():
        np.testing.assert_array_equal(value, teacher[name])


class Stopped(Exception):
    pass


def test_a_stop_request_ends_an_evaluation(trained):
    stage, calls = make(tiny_config()), []

    def stop():
        calls.append(1)
        raise Stopped

    stage.between_batches = stop
    with pytest.raises(Stopped):
        stage.evaluate(trained[1])
    assert len(calls) == 1


def test_pictures_without_a_label_are_left_out_of_the_knn_figures(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name in [f"{c}/{i}" for c in ("cat", "dog") for i in range(6)] + [
        f"loose{i}" for i in "abc"
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (72, 72, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    config, folder = tiny_config(**{"eval.knn_label": "label"}), DataConfig("folder", str(tmp_path))
    assert config.eval.knn_k > 12

    def figures(folder):
        evaluation = Evaluation(TokenFlow(TINY), config.eval, folder, folder, None, lambda: None)
        return evaluation.knn_figures(trained[1].params)

    found = figures(folder)
    assert set(found) == {"knn_semantic", "knn_pixel", "knn_largest_class"}
    assert found["knn_largest_class"] == 0.5  # of 12, not of 15
    shutil.rmtree(tmp_path / "cat")
    for picture in (tmp_path / "dog").iterdir():
        picture.write_bytes(b"broken")
    assert figures(dataclasses.replace(folder, min_side=16)) == {}


@pytest.mark.slow
def test_kmeans_start_uses_the_data():
    state = make(tiny_config(**{"codebook.init": "kmeans"})).init()
    plain = make(tiny_config()).init()
    assert not np.array_equal(state.params["pixel_codebook"], plain.params["pixel_codebook"])
    norms = np.linalg.norm(state.params["pixel_codebook"], axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-4)


@pytest.mark.slow
def test_a_run_with_several_indices_resumes_converts_and_decodes(tmp_path):
    """The resumed run equals the uninterrupted one; both formats give the run's codes."""
    config = tiny_config(**{"model.quantizer.heads": 2, "model.pixel_channels": 6})
    config.codebook.revive_every = 0
    whole = loop.train_and_evaluate(config, tmp_path / "a", make(config)).state
    shutil.copytree(tmp_path / "a" / "checkpoints" / "2", tmp_path / "b" / "checkpoints" / "2")
    state = loop.train_and_evaluate(config, tmp_path / "b", make(config)).state
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    trained = tfx.Tokenizer(TokenizerConfig(**config.model.to_dict()), whole.params)
    codes = np.asarray(trained.encode(images))
    for name in ("ours", "torch.safetensors", "torch.pt"):
        convert(tmp_path / "a", tmp_path / name, PART)
        loaded = tfx.Tokenizer.load(tmp_path / name)
        np.testing.assert_array_equal(loaded.encode(images), codes)
        np.testing.assert_allclose(loaded.decode(codes), trained.decode(codes), atol=1e-4)
    assert (tmp_path / "a" / "images" / "scales_0000004.png").exists()
    assert "eval/codes_used/head_1" in (tmp_path / "a" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_mixture_has_a_curve_for_each_source_and_goes_on_with_other_weights(tmp_path, caplog):
    lines = ("1 emoji as=faces", "3 emoji split=heldout as=others")
    config = tiny_config(**{"data.name": "mixture", "data.mixture": lines})
    config.eval_every = config.image_every = 0
    loop.train_and_evaluate(config, tmp_path / "a", make(config))
    shutil.copytree(tmp_path / "a" / "checkpoints" / "2", tmp_path / "b" / "checkpoints" / "2")
    state = loop.train_and_evaluate(config, tmp_path / "b", make(config)).state
    whole = tfx.Tokenizer.load(tmp_path / "a", ema=False).params["pixel_codebook"]
    np.testing.assert_array_equal(state.params["pixel_codebook"], whole)
    history = curves.read_history(tmp_path / "a" / "metrics.jsonl")
    found = {k: v for line in history for k, v in line.items()}
    faces, others = (found[f"source/{n}/reconstruction"] for n in ("faces", "others"))
    # Means over steps of means within steps: not exactly between the two.
    total = found["loss/reconstruction"]
    assert 0 < 0.95 * min(faces, others) <= total <= 1.05 * max(faces, others)
    config.data.mixture = ("9 emoji as=faces", "1 emoji split=heldout as=others")
    config.total_steps = 6
    loop.train_and_evaluate(config, tmp_path / "b", make(config))
    assert "weights of the mixture [1.0, 3.0] -> [9.0, 1.0]" in caplog.text
    assert "config.data.mixture" in caplog.text
    config.data.mixture = ("9 emoji as=faces", "1 emoji as=more")
    config.total_steps = 8
    with pytest.raises(CheckpointError, match="sources was"):
        loop.train_and_evaluate(config, tmp_path / "b", make(config))
