"""The residual pyramid, alone on stored features and in its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights
from golden.loading import GOLDEN

from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.pyramid import (
    Scales,
    draw_kept_scales,
    features_from_codes,
    residual_quantize,
    token_weights,
)
from tokenflow_jax.tokenizer.quantizer import Codebooks

SCALES = {
    "clipb_224": (1, 2, 4, 6, 8, 10, 12, 14),
    "clipb_256_enhanced": (1, 2, 4, 6, 8, 10, 12, 14, 16),
}


@pytest.fixture(scope="module")
def codebooks():
    return Codebooks(
        jnp.asarray(weights.tensor("quantize.embedding_vqkd.weight", (32768, 32))),
        jnp.asarray(weights.tensor("quantize.embedding_vqgan.weight", (32768, 8))),
    )


def _features(case):
    stored = np.load(GOLDEN / f"tokenizer_{case}.npz")
    halves = (stored["semantic_features"], stored["pixel_features"])
    return jnp.asarray(np.concatenate(halves, axis=1).transpose(0, 2, 3, 1)), stored


@pytest.mark.parametrize("case", SCALES)
def test_codes_and_map_of_stored_features(case, codebooks):
    features, stored = _features(case)
    scales = Scales(SCALES[case])
    pyramid = jax.jit(lambda f: residual_quantize(f, codebooks, scales))(features)
    np.testing.assert_array_equal(pyramid.codes_BL, stored["indices"])
    expected = stored["quantized"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pyramid.quantized_BHWC, expected, rtol=0, atol=2e-5)
    again = features_from_codes(pyramid.codes_BL, codebooks, scales)
    np.testing.assert_allclose(again, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case,dropped", [("keep", None), ("drop3", 3)])
def test_training_losses(case, dropped, codebooks):
    """Losses, entropy and distance norms of the reference in training mode."""
    features, _ = _features("clipb_224")
    golden = np.load(GOLDEN / "train_clipb_224.npz")
    scales = Scales(SCALES["clipb_224"])
    keep = jnp.ones(len(scales)) if dropped is None else jnp.ones(len(scales)).at[dropped].set(0)

    @jax.jit
    def losses(features):
        pyramid = residual_quantize(features, codebooks, scales, 1.0, keep)
        weights_L = token_weights(scales, keep)
        chosen = codebooks.look_up(pyramid.codes_BL)
        vq, commitment = quantizer.codebook_losses(pyramid.z_BLC, chosen, weights_L)
        table = codebooks.normalized()
        entropies = []
        for where in scales.slices():
            z = pyramid.z_BLC[:, where].reshape(-1, 40)
            even = jnp.full(len(z), 1 / len(z))
            entropies.append(quantizer.entropy_loss(z, table, even, 32))
        entropy = jnp.sum(jnp.stack(entropies) * keep) / keep.sum()
        distances = quantizer.distance_statistics(
            pyramid.z_BLC.reshape(-1, 40), table, jnp.tile(weights_L / 2, 2), 32
        )
        return pyramid.codes_BL, (vq, 0.25 * commitment, 0.1 * entropy, *distances)

    codes, values = losses(features)
    names = ("vq_loss", "commit_loss", "entropy_loss", "vqkd_d_norm", "vqgan_d_norm")
    for name, value in zip(names, values, strict=True):
        np.testing.assert_allclose(value, golden[f"{case}_{name}"], rtol=1e-4, err_msg=name)
    kept = [np.arange(s.start, s.stop) for i, s in enumerate(scales.slices()) if i != dropped]
    np.testing.assert_array_equal(codes[:, np.concatenate(kept)], golden[f"{case}_indices"])


def _small(codes=16):
    keys = jax.random.split(jax.random.key(3), 3)
    books = Codebooks(
        jax.random.normal(keys[0], (codes, 4)), jax.random.normal(keys[1], (codes, 2))
    )
    return books, jax.random.normal(keys[2], (2, 4, 4, 6))


@pytest.mark.parametrize("sides", [(4,), (1, 4), (2, 3, 4), (1, 2, 3, 4)])
def test_any_scale_list(sides):
    books, features = _small()
    scales = Scales(sides)
    pyramid = residual_quantize(features, books, scales)
    assert pyramid.codes_BL.shape == (2, sum(s * s for s in sides))
    again = features_from_codes(pyramid.codes_BL, books, scales)
    np.testing.assert_allclose(again, pyramid.quantized_BHWC, atol=1e-5)


def test_a_single_scale_is_plain_quantization():
    books, features = _small()
    pyramid = residual_quantize(features, books, Scales((4,)))
    z = quantizer.normalize_halves(features, 4).reshape(-1, 6)
    expected = books.normalized()[quantizer.nearest_codes(z, books.normalized(), 4)]
    np.testing.assert_allclose(pyramid.quantized_BHWC.reshape(-1, 6), expected, atol=1e-6)


def test_dropping_a_scale_equals_leaving_it_out():
    books, features = _small()
    keep = jnp.array([1.0, 0.0, 1.0])
    dropped = residual_quantize(features, books, Scales((1, 2, 4)), 1.0, keep)
    without = residual_quantize(features, books, Scales((1, 4)))
    np.testing.assert_array_equal(dropped.quantized_BHWC, without.quantized_BHWC)
    np.testing.assert_array_equal(dropped.codes_BL[:, 5:], without.codes_BL[:, 1:])


def test_drawing_scales():
    scales = Scales((1, 2, 3, 4))
    draw = jax.jit(lambda key: draw_kept_scales(key, scales, 0.5))
    draws = np.stack([draw(jax.random.key(i)) for i in range(200)])
    assert draws[:, 0].all()  # never the first
    assert set(draws.sum(1)) == {3.0, 4.0}  # one at most
    assert 60 < (draws.sum(1) == 3).sum() < 140
    assert all((draws[:, s] == 0).any() for s in (1, 2, 3))
    np.testing.assert_array_equal(draws[7], draw(jax.random.key(7)))
    assert draw_kept_scales(jax.random.key(0), Scales((16,)), 1.0).tolist() == [1.0]


def test_weights_average_within_then_over_kept_scales():
    weights_L = token_weights(Scales((1, 2, 4)), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(weights_L, [0.5] + [0] * 4 + [0.5 / 16] * 16)


def test_errors_name_both_sides():
    with pytest.raises(ValueError, match=r"7 codes .* one of \[1, 5, 21\]"):
        Scales((1, 2, 4)).prefix(7)
    for bad in ((), (2, 1), (1, 1, 2), (0, 2)):
        with pytest.raises(ValueError, match="ascending"):
            Scales(bad)
    books, features = _small()
    with pytest.raises(ValueError, match="4 x 4"):
        residual_quantize(features, books, Scales((1, 3)))
