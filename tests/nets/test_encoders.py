"""The semantic encoders, narrow, against timm's ViTamin and Hugging Face's SigLIP and CLIP.

`golden/encoders.npz` holds those libraries' outputs on the weights of `weights.py`, on normal
draws of `np.random.default_rng(0 | 1 | 2)`. Full-size parity is in test_api.py.
"""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.loading import GOLDEN

from tokenflow_jax.nets import encoders
from tokenflow_jax.nets.vit import ViTConfig
from tokenflow_jax.nets.vitamin import ViTaminConfig
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.names import encoders as loading

DRAW = runpy.run_path(str(GOLDEN / "weights.py"))["state_dict"]
MANIFESTS = json.loads((GOLDEN / "encoders.manifest.json").read_text())
EXPECTED = np.load(GOLDEN / "encoders.npz")
CONFIGS = {
    "vitamin": ViTaminConfig(
        image_size=64,
        stem_width=16,
        stage_widths=(16, 32),
        stage_depths=(1, 2),
        width=48,
        depth=3,
        heads=4,
    ),
    "siglip": ViTConfig(
        image_size=60,  # like the real one: 14 does not divide it
        patch_size=14,
        width=48,
        depth=2,
        heads=4,
        epsilon=1e-6,
        activation="gelu_tanh",
        mlp_width=180,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        post_norm=False,
    ),
    "clip": ViTConfig(image_size=32, patch_size=8, width=48, depth=2, heads=4, projection=20),
}
KINDS = list(CONFIGS)


def build(kind):
    config = CONFIGS[kind]
    module = encoders.encoder_kind(kind).module(config)
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return module, jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def read(tree):
    return jax.tree.map(lambda tensor: tensor.read(), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_features_from_a_published_file(kind, tmp_path):
    module, template = build(kind)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, DRAW(MANIFESTS[kind], 0))
    params = read(loading.open_encoder(kind, path, template))
    size = module.config.image_size
    seed = KINDS.index(kind)
    images = np.random.default_rng(seed).standard_normal((2, size, size, 3)).astype(np.float32)
    features = jax.jit(module.apply)({"params": params}, images)
    np.testing.assert_allclose(features, EXPECTED[kind], rtol=0, atol=2e-5)


def test_vitamin_inside_a_whole_open_clip_model(tmp_path):
    _, template = build("vitamin")
    state = {f"visual.trunk.{name}": v for name, v in DRAW(MANIFESTS["vitamin"], 0).items()}
    others = {"visual.head.proj.weight": (4, 4), "text.token_embedding.weight": (9, 4)}
    path = tmp_path / "open_clip.safetensors"
    write_safetensors(path, state | {k: np.zeros(v, np.float32) for k, v in others.items()})
    params = read(loading.open_encoder("vitamin", path, template))
    kernel = params["stage_1_block_0"]["depthwise"]["kernel"]
    torch_kernel = state["visual.trunk.patch_embed.backbone.stages.1.0.conv2_kxk.weight"]
    np.testing.assert_array_equal(kernel[1, 2, 0], torch_kernel[:, 0, 1, 2])


def test_a_file_of_another_encoder_lists_what_is_missing(tmp_path):
    _, template = build("siglip")
    path = tmp_path / "clip.safetensors"
    write_safetensors(path, DRAW(MANIFESTS["clip"], 0))
    with pytest.raises(rules.CheckpointMismatch, match=r"embeddings\.patch_embedding\.bias"):
        loading.open_encoder("siglip", path, template)


@pytest.mark.parametrize("kind", KINDS)
def test_remat_and_bfloat16(kind):
    module, template = build(kind)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), template)
    images = rng.standard_normal((1, *[module.config.image_size] * 2, 3)).astype(np.float32)

    def gradient(module):
        loss = lambda p: jnp.mean(module.apply({"params": p}, images) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    again = gradient(module.clone(remat=True))
    for a, b in zip(jax.tree.leaves(gradient(module)), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)({"params": params}, images)
    assert half.dtype == jnp.bfloat16
    whole = jax.jit(module.apply)({"params": params}, images)
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.05 * np.abs(whole).max())


def test_normalization_goes_through_clamped_pixels():
    images = jnp.array([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 5, 1) * jnp.ones(3)
    seen = encoders.normalize(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(seen[0, 0, :, 0], [-1, -1, 0, 1, 1], atol=1e-6)


def test_errors_name_the_limits():
    with pytest.raises(ValueError, match=r"'dino' is not one of \['clip', 'siglip', 'vitamin'\]"):
        encoders.encoder_kind("dino")
    with pytest.raises(ValueError, match=r"image_size 100 is not a multiple of 16.*heads 5"):
        ViTaminConfig(image_size=100, heads=5)
    with pytest.raises(ValueError, match="differ in length"):
        ViTaminConfig(stage_depths=(1,))
    module, template = build("vitamin")
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), template)
    with pytest.raises(ValueError, match="multiple of 16"):
        module.apply({"params": params}, jnp.zeros((1, 40, 40, 3)))
