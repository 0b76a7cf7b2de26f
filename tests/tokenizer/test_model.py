"""TokenFlow's modules together: shapes, options, gradients, clear errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig

TINY = dataclasses.replace(tiny.TINY, vit=dataclasses.replace(tiny.TINY.vit, depth=2))


@functools.cache
def build(config):
    """Model, random variables (drawn, not initialized, which would have to compile) and images."""
    rng, model = np.random.default_rng(0), TokenFlow(config)
    shape = (2, config.image_size, config.image_size, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    variables = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    return model, variables, rng.uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def model_and_variables():
    return build(TINY)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shapes_and_every_parameter_learns(kind):
    """Reconstruction and distillation reach all parts but the codebooks, which have their loss."""
    model, variables, images = build(tiny.KINDS[kind])

    def loss(variables):
        pyramid, decoded = model.apply(variables, images)
        value = jnp.mean(decoded.images_BHWC**2) + jnp.mean(decoded.semantic_BND**2)
        maps = model.apply(variables, pyramid.codes_BL, method="features")
        return value, (pyramid, decoded, maps)

    gradients, (pyramid, decoded, maps) = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert pyramid.codes_BL.shape == (2, 21) and pyramid.codes_BL.dtype == jnp.int32
    assert pyramid.quantized_BHWC.shape == (2, 4, 4, 9)
    assert decoded.images_BHWC.shape == images.shape
    assert decoded.semantic_BND.shape == (2, 16, 10)
    np.testing.assert_allclose(maps, pyramid.quantized_BHWC, atol=1e-5)
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, g in jax.tree_util.tree_leaves_with_path(gradients["params"])
        if jnp.abs(g).max() == 0
    ]
    assert sorted(still) == ["pixel_codebook", "semantic_codebook"]


def test_bfloat16_keeps_the_quantizer_in_float32(model_and_variables):
    _, variables, images = model_and_variables
    model = TokenFlow(TINY, dtype=jnp.bfloat16)
    features = jax.eval_shape(functools.partial(model.apply, method="encode"), variables, images)
    pyramid, decoded = jax.eval_shape(model.apply, variables, images)
    assert features.dtype == pyramid.quantized_BHWC.dtype == jnp.float32
    assert decoded.images_BHWC.dtype == decoded.semantic_BND.dtype == jnp.float32


@pytest.mark.slow
def test_remat_and_unroll_change_nothing(model_and_variables):
    _, variables, images = model_and_variables

    def gradient(model):
        loss = lambda v: jnp.mean(model.apply(v, images)[1].images_BHWC ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(variables)

    plain, remat = gradient(TokenFlow(TINY)), gradient(TokenFlow(TINY, remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    vit = {"params": variables["params"]["semantic_encoder"]}
    looped, unrolled = (jax.jit(ViT(TINY.vit, unroll=n).apply)(vit, images) for n in (1, 2))
    np.testing.assert_allclose(looped, unrolled, atol=1e-5)


def test_enhanced_decoder_is_wider_and_deeper():
    plain, enhanced = VARIANTS["b_256"], VARIANTS["b_256_enhanced"]
    assert (enhanced.decoder_channels, enhanced.decoder_blocks) == (256, 5)
    assert dataclasses.replace(enhanced, decoder_channels=128, decoder_blocks=3) == plain
    assert plain.pyramid.tokens == 817 and VARIANTS["b"].pyramid.tokens == 561


def test_the_large_variants():
    l, paper, xl = (VARIANTS[name] for name in ("l", "l_paper", "xl"))  # noqa: E741
    assert l.pyramid.tokens == 817 and paper.pyramid.tokens == 817 + 9
    assert xl.pyramid.tokens == 2227 and len(xl.scales) == 15
    assert (xl.pixel_image_size, xl.vit.grid, l.vit.grid) == (432, 27, 16)


@pytest.mark.parametrize("scales", [(4,), tuple(range(1, 17))])
def test_one_to_sixteen_scales(scales):
    side = scales[-1]
    vit = dataclasses.replace(TINY.vit, image_size=4 * side)
    model, variables, images = build(
        dataclasses.replace(TINY, scales=scales, image_size=4 * side, vit=vit)
    )
    pyramid, _ = jax.jit(model.apply)(variables, images)
    assert pyramid.codes_BL.shape == (2, sum(s * s for s in scales))


def test_the_detour_of_the_pixel_branch():
    """The pixel branch works at another size; the encoder's last pixels are not seen by either."""
    model, variables, images = build(tiny.TINY_XL)
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    features = encode(variables, images)
    assert features.shape[1:3] == (4, 4)
    blackened = images.copy()
    blackened[:, 56:] = -1  # beyond the last whole patch
    changed = encode(variables, blackened)
    semantic = tiny.TINY_XL.semantic_channels
    np.testing.assert_array_equal(changed[..., :semantic], features[..., :semantic])
    assert np.abs(changed[..., semantic:] - features[..., semantic:]).max() > 1e-3


@pytest.mark.parametrize(
    "change,message",
    [
        ({"image_size": 32}, "semantic grid of 8, but the scales .* end at 4.*pixel grid of 8"),
        ({"scales": (1, 2, 3)}, "end at 3"),
        ({"multipliers": (1, 1)}, "pixel grid of 8"),
        ({"pixel_image_size": 32}, "pixel_image_size 32 .* pixel grid of 8.*end at 4"),
        ({"semantic_encoder": "vitamin"}, "needs a ViTaminConfig, not a ViTConfig"),
        ({"semantic_encoder": "dino"}, "'dino' is not one of"),
        ({"codebook_size": 1}, "codebook_size 1 is below 2"),
        ({"norm_groups": 3}, "multiple of norm_groups 3"),
        ({"semantic_decoder_heads": 5}, "not a multiple of semantic_decoder_heads 5"),
    ],
)
def test_bad_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_misspelled_key_raises():
    with pytest.raises(TypeError, match="codebok_size"):
        TokenizerConfig(codebok_size=8)
    with pytest.raises(ValueError, match="patch_size"):
        ViTConfig(image_size=10, patch_size=14)


def test_wrong_image_size_raises(model_and_variables):
    model, variables, _ = model_and_variables
    with pytest.raises(ValueError, match="16 px"):
        model.apply(variables, jnp.zeros((1, 20, 20, 3)), method="encode")
