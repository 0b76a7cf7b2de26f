"""TokenFlow's modules together: shapes, options, gradients, clear errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokenflow_jax.models.tokenizer import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.models.vit import ViT, ViTConfig

TINY = dataclasses.replace(tiny.TINY, vit=dataclasses.replace(tiny.TINY.vit, depth=2))


@pytest.fixture(scope="module")
def model_and_variables():
    model = TokenFlow(TINY)
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1, maxval=1)
    return model, jax.jit(model.init)(jax.random.key(0), images), images


def test_shapes(model_and_variables):
    model, variables, images = model_and_variables
    pyramid, decoded = model.apply(variables, images)
    assert pyramid.codes_BL.shape == (2, 21) and pyramid.codes_BL.dtype == jnp.int32
    assert pyramid.quantized_BHWC.shape == (2, 4, 4, 9)
    assert decoded.images_BHWC.shape == images.shape
    assert decoded.semantic_BND.shape == (2, 16, 10)
    maps = model.apply(variables, pyramid.codes_BL, method="features")
    np.testing.assert_allclose(maps, pyramid.quantized_BHWC, atol=1e-5)


def test_every_parameter_learns(model_and_variables):
    """Reconstruction and distillation reach all parts but the codebooks, which have their loss."""
    model, variables, images = model_and_variables

    def loss(variables):
        _, decoded = model.apply(variables, images)
        return jnp.mean(decoded.images_BHWC**2) + jnp.mean(decoded.semantic_BND**2)

    gradients = jax.grad(loss)(variables)["params"]
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if jnp.abs(g).max() == 0
    ]
    assert sorted(still) == ["pixel_codebook", "semantic_codebook"]


def test_bfloat16_keeps_the_quantiser_in_float32(model_and_variables):
    _, variables, images = model_and_variables
    model = TokenFlow(TINY, dtype=jnp.bfloat16)
    features = model.apply(variables, images, method="encode")
    pyramid, decoded = model.apply(variables, images)
    assert features.dtype == pyramid.quantized_BHWC.dtype == jnp.float32
    assert decoded.images_BHWC.dtype == decoded.semantic_BND.dtype == jnp.float32


def test_remat_and_unroll_change_nothing(model_and_variables):
    _, variables, images = model_and_variables

    def gradient(model):
        loss = lambda v: jnp.mean(model.apply(v, images)[1].images_BHWC ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(variables)

    plain, remat = gradient(TokenFlow(TINY)), gradient(TokenFlow(TINY, remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    vit = {"params": variables["params"]["semantic_encoder"]}
    looped = ViT(TINY.vit).apply(vit, images)
    np.testing.assert_allclose(looped, ViT(TINY.vit, unroll=2).apply(vit, images), atol=1e-5)


def test_enhanced_decoder_is_wider_and_deeper():
    plain, enhanced = VARIANTS["b_256"], VARIANTS["b_256_enhanced"]
    assert (enhanced.decoder_channels, enhanced.decoder_blocks) == (256, 5)
    assert dataclasses.replace(enhanced, decoder_channels=128, decoder_blocks=3) == plain
    assert plain.pyramid.tokens == 817 and VARIANTS["b"].pyramid.tokens == 561


@pytest.mark.parametrize(
    "change,message",
    [
        ({"image_size": 32}, "semantic grid of 8, but the scales .* end at 4.*pixel grid of 8"),
        ({"scales": (1, 2, 3)}, "end at 3"),
        ({"multipliers": (1, 1)}, "pixel grid of 8"),
        ({"semantic_encoder": "dino"}, "'dino' is not one of"),
        ({"codebook_size": 1}, "codebook_size 1 is below 2"),
        ({"norm_groups": 3}, "multiple of norm_groups 3"),
        ({"semantic_decoder_heads": 5}, "not a multiple of semantic_decoder_heads 5"),
    ],
)
def test_bad_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_misspelt_key_raises():
    with pytest.raises(TypeError, match="codebok_size"):
        TokenizerConfig(codebok_size=8)
    with pytest.raises(ValueError, match="patch_size"):
        ViTConfig(image_size=10, patch_size=4)


def test_wrong_image_size_raises(model_and_variables):
    model, variables, _ = model_and_variables
    with pytest.raises(ValueError, match="16 px"):
        model.apply(variables, jnp.zeros((1, 20, 20, 3)), method="encode")
