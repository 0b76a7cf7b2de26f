"""The discriminators and the adversarial losses against the reference's outputs."""

import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_states
from discriminator_names import patchgan_rules, stylegan_rules
from PIL import Image

from tokenflow_jax.nets.discriminator import (
    BatchNorm,
    PatchGAN,
    StyleGAN,
    blur,
    make_discriminator,
)
from tokenflow_jax.tokenizer import losses
from tokenflow_jax.weights import rules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VECTORS = np.load(GOLDEN / "parts_small.npz")
STATISTICS = {"running_mean": "mean", "running_var": "var"}


def images(size):
    """Both golden images, (2, size, size, 3) in [-1, 1]."""
    files = [GOLDEN / f"images/{name}_{size}.png" for name in ("astronaut", "coffee")]
    return np.stack([np.asarray(Image.open(file), np.float32) / 127.5 - 1 for file in files])


@functools.cache
def golden_variables(name):
    manifest = json.loads((GOLDEN / f"{name}.manifest.json").read_text())
    state = runpy.run_path(str(GOLDEN / "weights.py"))["state_dict"](manifest, 0)
    init = functools.partial(PatchGAN().init, jax.random.key(0), train=False)
    return rules.to_flax(state, patchgan_rules(), jax.eval_shape(init, jnp.zeros((1, 64, 64, 3))))


def test_logits_with_running_statistics():
    logits = PatchGAN().apply(golden_variables("parts.patchgan"), images(256), False)
    assert logits.shape == (2, 30, 30, 1) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[..., 0], VECTORS["patchgan_eval"][:, 0], atol=1e-4)


def test_logits_and_statistics_of_a_training_pass():
    logits, updates = PatchGAN().apply(
        golden_variables("parts.patchgan"), images(256), True, mutable="batch_stats"
    )
    np.testing.assert_allclose(logits[..., 0], VECTORS["patchgan_train"][:, 0], atol=1e-4)
    prefix = "patchgan_after_train/main."
    checked = 0
    for key in VECTORS.files:
        if key.startswith(prefix):
            position, name = key.removeprefix(prefix).split(".")
            statistics = updates["batch_stats"][f"norm_{int(position) // 3}"]
            np.testing.assert_allclose(statistics[STATISTICS[name]], VECTORS[key], atol=1e-6)
            checked += 1
    assert checked == 6


def test_training_logits_at_224_pixels():
    variables = golden_variables("loss_clipb_224.discriminator")
    logits = PatchGAN().apply(variables, images(224), True)  # batch_stats not mutable: unchanged
    np.testing.assert_allclose(logits[..., 0], VECTORS["logits_real"][:, 0], atol=1e-4)


SHARDED = """
import jax, numpy as np
from tokenflow_jax.nets.discriminator import BatchNorm
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).normal(3, 2, (4, 5, 5, 6)).astype(np.float32)
sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
variables = BatchNorm().init(jax.random.key(0), x, True)
apply = jax.jit(lambda v, x: BatchNorm().apply(v, x, True, mutable="batch_stats"))
found, expected = apply(variables, sharded), apply(variables, x)
assert len(found[0].sharding.device_set) == 2
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
"""


def test_statistics_are_of_the_global_batch_when_sharded():
    """The mean over a sharded axis under jit is the mean over both devices' parts."""
    flags = {"JAX_NUM_CPU_DEVICES": "2"}
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, **flags, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True, timeout=300)


def test_batch_norm_by_hand():
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 3, 4)).astype(np.float32)
    variables = BatchNorm().init(jax.random.key(0), x, True)
    np.testing.assert_array_equal(
        variables["batch_stats"]["mean"], np.zeros(4)
    )  # not updated by init
    y, updates = BatchNorm().apply(variables, x, True, mutable="batch_stats")
    values = x.reshape(-1, 4).astype(np.float64)
    scale = variables["params"]["scale"]
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5) * scale
    np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=1e-5)
    statistics = updates["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)


def test_initial_values_follow_the_reference():
    init = jax.jit(PatchGAN().init, static_argnums=2)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False)["params"]
    assert {name for name in params if "bias" in params[name]} == {
        "conv_0",
        "conv_out",
        "norm_1",
        "norm_2",
        "norm_3",
    }
    kernels = np.concatenate([v["kernel"].ravel() for k, v in params.items() if "conv" in k])
    np.testing.assert_allclose([kernels.mean(), kernels.std()], [0, 0.02], atol=2e-4)
    scale = params["norm_3"]["scale"]
    np.testing.assert_allclose([scale.mean(), scale.std()], [1, 0.02], atol=3e-3)
    assert not params["norm_3"]["bias"].any()
    assert 0 < np.abs(params["conv_0"]["bias"]).max() <= 48**-0.5


def test_bfloat16_stays_near_float32_and_keeps_float32_statistics():
    variables = golden_variables("parts.patchgan")
    logits, updates = PatchGAN(dtype=jnp.bfloat16).apply(
        variables, images(256)[:, :64, :64], True, mutable="batch_stats"
    )
    exact = PatchGAN().apply(variables, images(256)[:, :64, :64], True)
    assert logits.dtype == updates["batch_stats"]["norm_1"]["var"].dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.1)


def test_too_small_images_are_rejected():
    variables = golden_variables("parts.patchgan")
    with pytest.raises(ValueError, match=r"\(16, 64\).*needs 24"):
        PatchGAN().apply(variables, jnp.zeros((1, 16, 64, 3)), False)
    assert PatchGAN().apply(variables, jnp.zeros((1, 24, 24, 3)), False).shape == (1, 1, 1, 1)


# --- losses ---------------------------------------------------------------------------------------

REAL, FAKE = VECTORS["logits_real"], VECTORS["logits_fake"]


@pytest.mark.parametrize(
    ("golden", "kind"),
    [
        ("hinge_d", "hinge"),
        ("vanilla_d", "vanilla"),
        ("non_saturating_d", "non_saturating_reference"),
    ],
)
def test_discriminator_losses(golden, kind):
    loss = losses.discriminator_loss(kind, REAL, FAKE)
    np.testing.assert_allclose(loss, VECTORS[golden], rtol=1e-5)


@pytest.mark.parametrize(
    ("golden", "kind"), [("hinge_g", "hinge"), ("non_saturating_g", "non_saturating_reference")]
)
def test_generator_losses(golden, kind):
    np.testing.assert_allclose(losses.generator_loss(kind, FAKE), VECTORS[golden], rtol=1e-5)


def test_correct_non_saturating_losses_by_hand():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x.astype(np.float64)))

    expected_d = -(np.log(sigmoid(REAL)).mean() + np.log(1 - sigmoid(FAKE)).mean()) / 2
    expected_g = -np.log(sigmoid(FAKE)).mean()
    np.testing.assert_allclose(
        losses.discriminator_loss("non_saturating", REAL, FAKE), expected_d, rtol=1e-5
    )
    np.testing.assert_allclose(losses.generator_loss("non_saturating", FAKE), expected_g, rtol=1e-5)
    # The original's gives the discriminator no gradient from reconstructions; this one does.
    slopes = [
        np.abs(jax.grad(lambda fake, k=kind: losses.discriminator_loss(k, REAL, fake))(FAKE)).max()
        for kind in ("non_saturating", "non_saturating_reference")
    ]
    assert slopes[0] > 0 and slopes[1] == 0


def test_losses_of_low_precision_logits_are_float32():
    half = jnp.asarray(FAKE, jnp.bfloat16)
    for kind in losses.GENERATOR_LOSSES:
        assert losses.generator_loss(kind, half).dtype == jnp.float32
        assert losses.discriminator_loss(kind, half, half).dtype == jnp.float32


def test_unknown_losses_name_the_known_ones():
    for call in (
        lambda: losses.generator_loss("hing", FAKE),
        lambda: losses.discriminator_loss("hing", REAL, FAKE),
    ):
        with pytest.raises(ValueError, match=r"'hing': choose one of .*'hinge'.*'vanilla'"):
            call()


def test_stylegan_against_the_reference():
    manifest = json.loads((GOLDEN / "parts.stylegan.manifest.json").read_text())
    state = runpy.run_path(str(GOLDEN / "weights.py"))["state_dict"](manifest, 0)
    shapes = jax.eval_shape(StyleGAN().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)), False)
    variables = rules.to_flax(state, stylegan_rules(256), shapes)
    buffers = torch_states.read_buffers(state, stylegan_rules(256))
    back = torch_states.to_torch(variables, stylegan_rules(256), buffers)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    logits = jax.jit(StyleGAN().apply, static_argnums=2)(variables, images(256), True)
    np.testing.assert_allclose(logits, VECTORS["stylegan"], atol=1e-4)


def test_blur_against_the_reference():
    blurred = blur(VECTORS["blur_in"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(blurred.transpose(0, 3, 1, 2), VECTORS["blur_out"], atol=1e-6)


def test_stylegan_needs_a_power_of_two():
    for shape in ((1, 224, 224, 3), (1, 32, 64, 3), (1, 4, 4, 3)):
        with pytest.raises(ValueError, match="power of two"):
            jax.eval_shape(StyleGAN().init, jax.random.key(0), jnp.zeros(shape), False)


def test_discriminators_by_name():
    assert make_discriminator("patchgan", filters=8, layers=2) == PatchGAN(filters=8, layers=2)
    assert isinstance(make_discriminator("stylegan"), StyleGAN)
    with pytest.raises(ValueError, match="'gan' is not one of"):
        make_discriminator("gan")
