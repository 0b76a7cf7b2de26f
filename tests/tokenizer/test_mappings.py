"""How codes are found and looked up in every form of codebooks, against dense NumPy forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.tokenizer import mappings
from tokenflow_jax.tokenizer.kinds import QuantizerConfig
from tokenflow_jax.tokenizer.pyramid import Scales, features_from_codes, residual_quantize
from tokenflow_jax.tokenizer.quantizer import nearest_codes

SEMANTIC, PIXEL, LEVELS = 5, 3, (5, 4, 3)
WEIGHT = 0.7
SHARED = {"vq": 37, "bsq": 8, "lfq": 8, "fsq": 60}  # sizes that grids ask for
FORMS = [(kind, mapping) for kind in SHARED for mapping in ("shared", "separate")]
FORMS += [("vq", "joined")]


def make(kind, mapping):
    config = QuantizerConfig(kind, mapping, LEVELS if kind == "fsq" else ())
    size = SHARED[kind] if mapping == "shared" else 37
    shapes = config.parameters(size, {"semantic": SEMANTIC, "pixel": PIXEL})
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(shape) for name, (_, shape) in shapes.items()}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return config, params, config.codebooks(params, PIXEL)


def test_heads_are_the_shared_mapping_in_each_part():
    """Sub-codebooks against NumPy, head by head; codes of a token follow each other."""
    rng, heads = np.random.default_rng(0), 3
    params = {
        "semantic_codebook": rng.standard_normal((11, 6)).astype(np.float32),
        "pixel_codebook": rng.standard_normal((11, 3)).astype(np.float32),
    }
    config = QuantizerConfig(heads=heads)
    books = config.codebooks(params, 3)
    features = rng.standard_normal((2, 4, 4, 9)).astype(np.float32)
    scales = Scales((1, 4))
    made = residual_quantize(features, books, scales, WEIGHT, None, config)
    assert made.codes_BL.shape == (2, 17 * heads)
    again = features_from_codes(made.codes_BL, books, scales)
    np.testing.assert_allclose(again, made.quantized_BHWC, atol=1e-5)
    coarse = features_from_codes(made.codes_BL[:, :heads], books, scales)
    finest = residual_quantize(features, books, Scales((4,)), WEIGHT, None, config)
    codes = np.asarray(finest.codes_BL).reshape(32, heads)
    tokens, vectors = features.reshape(32, 9).astype(float), np.empty((32, 9))
    for h in range(heads):
        where_s, where_p = slice(2 * h, 2 * h + 2), slice(6 + h, 7 + h)
        z_s, z_p = unit(tokens[:, where_s]), unit(tokens[:, where_p])
        rows_s = unit(params["semantic_codebook"][:, where_s].astype(float))
        rows_p = unit(params["pixel_codebook"][:, h : h + 1].astype(float))
        distance = ((z_s[:, None] - rows_s) ** 2).sum(-1)
        distance += WEIGHT * ((z_p[:, None] - rows_p) ** 2).sum(-1)
        np.testing.assert_array_equal(codes[:, h], distance.argmin(-1))
        vectors[:, where_s], vectors[:, where_p] = rows_s[codes[:, h]], rows_p[codes[:, h]]
    np.testing.assert_allclose(finest.quantized_BHWC.reshape(32, 9), vectors, atol=1e-6)
    assert np.abs(coarse - coarse[:, :1, :1]).max() < 1e-6  # one token fills the map
    with pytest.raises(ValueError, match=r"50 codes per image .* one of \[3, 51\]"):
        features_from_codes(made.codes_BL[:, :50], books, scales)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def squash(x):
    """FSQ's bound as its appendix has it: an odd number of levels around zero."""
    levels = np.array(LEVELS)
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2, 0.0, 0.5)
    return np.tanh(x + np.arctanh(offset / half)) * half - offset


def dense(kind, mapping, features, books):
    """Return the codes and their vectors by the definitions; the grid is written out anew."""
    semantic, pixel = features[:, :SEMANTIC].astype(float), features[:, SEMANTIC:].astype(float)
    rows_s, rows_p = (np.asarray(book, float) for book in books)
    if mapping == "joined":
        z, rows = (
            unit(np.concatenate([semantic, pixel], -1)),
            unit(np.concatenate([rows_s, rows_p], -1)),
        )
        codes = ((z[:, None] - rows) ** 2).sum(-1).argmin(-1)
        return codes, rows[codes]
    rows_s, z_s = unit(rows_s), unit(semantic)
    z_p, grid = unit(pixel), rows_p
    if kind == "vq":
        grid = unit(rows_p)
    if kind in ("lfq", "bsq"):
        signs = np.array([[2 * (k >> d & 1) - 1 for d in range(PIXEL)] for k in range(8)])
        grid, z_p = (signs, pixel) if kind == "lfq" else (signs / np.sqrt(PIXEL), z_p)
    if kind == "fsq":
        half = np.array(LEVELS) // 2
        digits = [(k % 5, k // 5 % 4, k // 20) for k in range(60)]
        grid, z_p = (np.array(digits) - half) / half, squash(pixel) / half
    d_s = ((z_s[:, None] - rows_s) ** 2).sum(-1)
    d_p = ((z_p[:, None] - grid) ** 2).sum(-1)
    if mapping == "shared":
        codes = (d_s + WEIGHT * d_p).argmin(-1)
        return codes, np.concatenate([rows_s[codes], grid[codes]], -1)
    i, j = d_s.argmin(-1), d_p.argmin(-1)
    return i * len(grid) + j, np.concatenate([rows_s[i], grid[j]], -1)


@pytest.mark.parametrize(("kind", "mapping"), FORMS)
def test_codes_and_vectors_equal_the_dense_form(kind, mapping):
    _, _, books = make(kind, mapping)
    features = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    tables = books.tables()
    searches = books.searches(books.inputs(features), tables, WEIGHT)
    codes = books.joined(*(nearest_codes(*search) for search in searches))
    expected, vectors = dense(kind, mapping, features, books)
    np.testing.assert_array_equal(codes, expected)
    assert codes.dtype == np.int32 and codes.min() >= 0 and codes.max() < books.size
    np.testing.assert_allclose(books.rows(tables, codes), vectors, atol=1e-6)
    np.testing.assert_allclose(books.look_up(codes), vectors, atol=1e-6)
    grid = books.look_up(codes.reshape(4, 50))
    np.testing.assert_array_equal(grid.reshape(200, 8), books.look_up(codes))


def test_fsq_separately_is_rounding_and_its_gradient_is_that_of_the_bound():
    """Eq. 1 of the paper: round(f(z)), straight through the rounding."""
    config, _, books = make("fsq", "separate")
    features = np.random.default_rng(0).standard_normal((1, 9, 9, 8)).astype(np.float32) * 2
    scales = Scales((9,))

    def pixels(features):
        made = residual_quantize(features, books, scales, 1.0, None, config)
        return jnp.sum(made.quantized_BHWC[..., SEMANTIC:] * weights), made

    weights = np.random.default_rng(1).standard_normal((1, 9, 9, PIXEL)).astype(np.float32)
    gradient, made = jax.grad(pixels, has_aux=True)(features)
    half = np.array(LEVELS) // 2
    x = features[..., SEMANTIC:].astype(float)
    rounded = np.round(squash(x)) / half
    np.testing.assert_allclose(made.quantized_BHWC[..., SEMANTIC:], rounded, atol=1e-6)
    digits = np.round(squash(x)).astype(int) + half
    index = (digits * [1, 5, 20]).sum(-1).reshape(1, -1)
    np.testing.assert_array_equal(made.codes_BL % 60, index)
    slope = (squash(x + 1e-6) - squash(x - 1e-6)) / 2e-6 / half
    np.testing.assert_allclose(gradient[..., SEMANTIC:], weights * slope, atol=1e-4)
    assert np.abs(gradient[..., :SEMANTIC]).max() == 0
    np.testing.assert_allclose(mappings.bounded(jnp.zeros(3), LEVELS), 0, atol=1e-6)


@pytest.mark.parametrize(("kind", "mapping"), FORMS)
def test_a_pyramid_is_rebuilt_from_its_codes(kind, mapping):
    config, _, books = make(kind, mapping)
    features = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    scales = Scales((1, 2, 4))
    made = residual_quantize(features, books, scales, WEIGHT, None, config)
    assert made.codes_BL.shape == (2, 21)
    again = features_from_codes(made.codes_BL, books, scales)
    np.testing.assert_allclose(again, made.quantized_BHWC, atol=1e-5)


def test_rows_of_separate_codebooks_get_the_gradient_of_their_own_index():
    _, _, books = make("vq", "separate")
    gradient = jax.grad(lambda b: jnp.sum(b.look_up(jnp.array([3 * 37 + 5])) * jnp.arange(8.0)))(
        books
    )
    for half, row in ((gradient.semantic_KC, 3), (gradient.pixel_KC, 5)):
        assert set(np.flatnonzero(np.abs(half).max(-1))) == {row}
