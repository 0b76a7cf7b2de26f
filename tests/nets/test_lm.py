"""The decoder against transformers' results; its cache, masks, remat and chunked loss."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.nets import attention as attention_lib
from tokenflow_jax.nets import lm
from tokenflow_jax.nets.attention import NOT_ALLOWED, attention, choose
from tokenflow_jax.nets.lm import Decoder, LMConfig
from tokenflow_jax.nets.masks import Blocks, Mask
from tokenflow_jax.weights import language_model, rules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
CASES = json.loads((GOLDEN / "language_models.json").read_text())
TINY = LMConfig(
    vocabulary_size=61, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, qk_norm=True
)


def golden(case):
    with np.load(GOLDEN / "language_models.npz") as file:
        arrays = {n.split(":")[1]: file[n] for n in file.files if n.startswith(f"{case}:")}
    config = language_model.config_from_json(CASES[case]["config"])
    state = WEIGHTS["state_dict"](CASES[case]["shapes"], seed=0)
    table, template = (
        language_model.language_model_table(config),
        language_model.language_model_template(config),
    )
    return config, {"params": rules.to_flax(state, table, template)}, arrays


def tiny(**changes):
    decoder = Decoder(dataclasses.replace(TINY, **changes))
    ids = jax.random.randint(jax.random.key(1), (3, 14), 0, TINY.vocabulary_size)
    params = decoder.init(jax.random.key(0), ids, method="whole")
    # Larger weights than the initial ones, so that attention is far from even.
    return decoder, jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, params), ids


@pytest.mark.parametrize("case", sorted(CASES))
def test_equals_transformers(case):
    """Left-padded rows included: padding queries see no key and attend evenly, as in PyTorch."""
    config, params, want = golden(case)
    decoder = Decoder(config)
    hidden, _ = decoder.apply(
        params,
        decoder.apply(params, want["ids"], method="embed"),
        want["positions"],
        Mask(jnp.asarray(want["real"])),
    )
    logits = decoder.apply(params, hidden, method="logits")
    real = want["real"]
    np.testing.assert_allclose(hidden[real], want["hidden"][real], atol=5e-5, rtol=0)
    np.testing.assert_allclose(logits[real], want["logits"][real], atol=5e-5, rtol=0)
    some = decoder.apply(params, hidden, rows=(7, 11), method="logits")
    np.testing.assert_allclose(some, logits[..., 7:18], atol=1e-6)


def test_the_cases_would_notice_differences():
    """The bound above would notice another rotation base, epsilon or a missing bias."""
    config, params, want = golden("qwen2")
    ids = jnp.asarray(want["ids"][:1])
    reference = want["logits"][:1]
    for change in ({"rope_theta": 1e4}, {"norm_eps": 1e-5}):
        other = Decoder(dataclasses.replace(config, **change)).apply(params, ids, method="whole")
        assert np.abs(other - reference).max() > 1e-4
    without = jax.tree.map(lambda x: x, params)
    without["params"]["blocks"]["attention"]["k"]["bias"] *= 0
    assert np.abs(Decoder(config).apply(without, ids, method="whole") - reference).max() > 1e-4


@pytest.mark.parametrize("norms", lm.NORMS)
def test_cached_decoding_equals_one_pass(norms):
    """Prompt, one token, several tokens; with and without a bound on what attention reads."""
    decoder, params, ids = tiny(norms=norms)
    want = decoder.apply(params, ids, method="whole")

    def cached(params, ids, bounded):
        cache = lm.init_cache(decoder.config, 3, 16)
        out = []
        for start, stop in ((0, 5), (5, 6), (6, 14)):
            cache = cache.at(cache.length, stop if bounded else 0)
            embeddings = decoder.apply(params, ids[:, start:stop], method="embed")
            positions = jnp.arange(start, stop)[None]
            hidden, cache = decoder.apply(params, embeddings, positions, None, cache)
            out.append(decoder.apply(params, hidden, method="logits"))
        return jnp.concatenate(out, axis=1), cache.length

    for bounded in (True, False):
        got, length = jax.jit(cached, static_argnums=2)(params, ids, bounded)
        np.testing.assert_allclose(got, want, atol=2e-6)
        assert length == 14


def test_cache_rewinds():
    """Tokens behind the length are overwritten and never read."""
    decoder, params, ids = tiny()
    positions = jnp.arange(14)[None]
    embeddings = decoder.apply(params, ids, method="embed")

    def run(cache, start, stop, x=embeddings):
        part = x[:, start:stop], positions[:, start:stop]
        return decoder.apply(params, *part, None, cache)

    @jax.jit
    def clean_and_rewound():
        _, cache = run(lm.init_cache(decoder.config, 3, 14), 0, 4)
        _, dirty = run(cache, 4, 14, 3 + embeddings)
        return run(cache, 4, 9)[0], run(dirty.at(4), 4, 9)[0]

    np.testing.assert_array_equal(*clean_and_rewound())


def test_left_padding_in_a_cache_changes_nothing():
    decoder, params, ids = tiny()
    pad = 3
    real = jnp.arange(14 + pad) >= pad
    cache = lm.init_cache(decoder.config, 3, 14 + pad)
    padded = jnp.pad(ids, ((0, 0), (pad, 0)))
    hidden, _ = decoder.apply(
        params,
        decoder.apply(params, padded, method="embed"),
        jnp.maximum(jnp.arange(14 + pad) - pad, 0)[None],
        Mask(jnp.broadcast_to(real, (3, 14 + pad))),
        cache,
    )
    logits = decoder.apply(params, hidden[:, pad:], method="logits")
    np.testing.assert_allclose(logits, decoder.apply(params, ids, method="whole"), atol=2e-6)


def test_mask_of_blocks():
    """The example in the module's docstring, whole and from a later query on."""
    want = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            *[[1, 1, 1, 1, 1, 1, 1, 0]] * 4,
            [1, 1, 1, 1, 1, 1, 1, 1],
        ],
        bool,
    )
    mask = Mask(blocks=Blocks(2, (1, 4)))
    np.testing.assert_array_equal(mask.allowed(8, 8)[0], want)
    np.testing.assert_array_equal(mask.allowed(3, 8, 4)[0], want[4:7])
    later = jax.jit(lambda first: mask.allowed(3, 8, first))(4)
    np.testing.assert_array_equal(later[0], want[4:7])
    real = jnp.array([[False, True, True, True, True, True, True, True]])
    got = Mask(real, Blocks(2, (1, 4))).allowed(8, 8)[0]
    np.testing.assert_array_equal(got, want & np.asarray(real))
    with pytest.raises(ValueError, match=r"covers 8 keys.*reads 9"):
        Mask(real).allowed(9, 9)


def test_a_query_without_keys_attends_evenly_and_passes_gradients():
    """The mask is added: most negative float32 swallows the score, its gradient stays."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
    nothing = jnp.zeros((1, 5, 5), bool)
    out = attention(q, k, v, nothing)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
    gradient = jax.grad(lambda q: (attention(q, k, v, nothing) ** 2).sum())(q)
    assert np.abs(gradient).max() > 1e-2
    assert float(np.float32(1e6) + np.float32(NOT_ALLOWED)) == NOT_ALLOWED


def test_unusable_kernels_are_explained():
    shape = (2, 100, 4, 24)
    assert choose("auto", Mask(), jnp.float32, shape, False) == "xla"
    with pytest.raises(ValueError, match=r"splash.*TPUs.*cache.*array.*24 is not a multiple"):
        choose("splash", jnp.ones((1, 9, 9), bool), jnp.float32, shape, True)
    with pytest.raises(ValueError, match=r"cudnn.*NVIDIA.*bfloat16 or float16, not float32"):
        choose("cudnn", Mask(), jnp.float32, shape, False)
    with pytest.raises(ValueError, match="one of auto"):
        choose("flash", Mask(), jnp.float32, shape, False)


@pytest.mark.slow
def test_splash_attention_equals_xla():
    """The interpreted kernel with grouped heads, padding, a partial tile, blocks, shared rows."""
    length, width = 150, 64
    q = jax.random.normal(jax.random.key(0), (2, length, 4, width))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, length, 2, width))
    real = jnp.arange(length) >= jnp.array([[0], [17]])
    blocks = Mask(real, Blocks(30, (1, 4, 16, 64)))
    segments = jnp.where(real, 1 + (jnp.arange(length) >= jnp.array([[40], [90]])), 0)
    for mask in (blocks, Mask(real, segments_BK=segments)):
        check_splash(mask, real, q, k, v)


def check_splash(mask, real, q, k, v):
    length = q.shape[1]

    def xla(q, k, v):
        return attention(q, k, v, mask.allowed(length, length))

    def splash(q, k, v):
        return attention_lib._splash(q, k, v, mask, interpret=True)

    def loss(function, *arrays):
        return jnp.where(real[..., None, None], function(*arrays), 0).sum() ** 2

    np.testing.assert_allclose(splash(q, k, v)[real], xla(q, k, v)[real], atol=2e-5)
    got, want = (jax.grad(loss, (1, 2, 3))(function, q, k, v) for function in (splash, xla))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_config_reports_everything():
    with pytest.raises(ValueError, match=r"layers=0.*remat='all'.*attention='best'"):
        LMConfig(9, 32, 0, 4, 2, 48, remat="all", attention="best")
    with pytest.raises(ValueError, match="kv_heads=3 does not divide heads=4"):
        LMConfig(9, 32, 1, 4, 3, 48)
    with pytest.raises(ValueError, match="heads=3 does not divide width=32"):
        LMConfig(9, 32, 1, 3, 3, 48)


def plain_loss(decoder, params, ids, labels):
    logits = decoder.apply(params, ids, method="whole")
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.where(labels >= 0, own, 0).sum()


@pytest.mark.parametrize("remat, tied", [("none", False), ("block", True), ("dots", False)])
def test_chunked_loss_equals_the_plain_one(remat, tied):
    decoder, params, ids = tiny(remat=remat, tied_head=tied)
    labels = jnp.where(ids % 4 == 0, -100, ids)

    def chunked(params):
        embeddings = decoder.apply(params, ids, method="embed")
        hidden, _ = decoder.apply(params, embeddings, jnp.arange(14)[None])
        losses, _ = decoder.apply(params, hidden, labels, 12, method="token_losses")
        return losses.sum()

    total, gradients = jax.jit(jax.value_and_grad(chunked))(params)
    plain = jax.value_and_grad(lambda p: plain_loss(decoder, p, ids, labels))
    want, wanted = jax.jit(plain)(params)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, wanted)
