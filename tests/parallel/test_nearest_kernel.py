"""The TPU kernel of the nearest code: interpreted, and compiled for chips that need not exist."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.parallel import chips, nearest_kernel
from tokenflow_jax.tokenizer import quantizer

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# 32 images of 2 x 2 + 8 x 8 tokens by 131,072 codes would be 1.1 GB.
MOST_TEMPORARIES = 384 * 2**20


def run(*arguments, **environment):
    environment = {k: v for k, v in os.environ.items() if k != nearest_kernel.VARIABLE} | {
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    command = [sys.executable, str(HELPERS / "nearest_program.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def draw(tokens, codes, channels, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal((rows, channels)) for rows in (tokens, codes))
    return [np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in arrays]


# One block and several, full and not; tokens in one block of 128 and in two; odd channels.
@pytest.mark.parametrize(
    ("tokens", "codes", "channels"),
    [(1, 1, 3), (8, 2048, 40), (129, 513, 40), (300, 1300, 13), (1100, 2060, 40)],
)
def test_codes_and_scores_equal_the_chunked_form(tokens, codes, channels):
    z_NC, codes_KC = draw(tokens, codes, channels)
    z_NC[:, channels // 2 :] *= 1.7  # the pixel distance's weight
    score_N, code_N = nearest_kernel.best_of(z_NC, codes_KC, interpret=True)
    expected_score_N, expected_N = quantizer._best_by_chunks(z_NC, codes_KC)
    np.testing.assert_array_equal(code_N, expected_N)
    np.testing.assert_allclose(score_N, expected_score_N, rtol=0, atol=5e-7)
    exact = (z_NC.astype(np.float64) @ codes_KC.T.astype(np.float64)).max(axis=-1)
    np.testing.assert_allclose(score_N, exact, rtol=0, atol=3e-7)


def test_ties_go_to_the_lowest_index(monkeypatch):
    """Within a block, across blocks, and between the running maxima side by side."""
    monkeypatch.setattr(nearest_kernel, "_MAX_ROWS", 256)
    z_NC, codes_KC = draw(200, 400, 40)
    doubled_KC = np.concatenate([codes_KC, codes_KC[::-1], codes_KC])
    _, expected_N = quantizer._best_by_chunks(z_NC, codes_KC)
    _, code_N = nearest_kernel.best_of(z_NC, doubled_KC, interpret=True)
    np.testing.assert_array_equal(code_N, expected_N)
    same_KC = np.repeat(codes_KC[:1], 700, axis=0)
    assert not nearest_kernel.best_of(z_NC, same_KC, interpret=True)[1].any()


def test_degenerate_tokens():
    """Negative scores only (padded codes would score 0), zeros, and NaN."""
    z_NC, codes_KC = draw(3, 130, 8)
    codes_KC[:] = -abs(codes_KC)
    z_NC[0] = abs(z_NC[0])
    z_NC[1], z_NC[2] = 0, np.nan
    score_N, code_N = nearest_kernel.best_of(z_NC, codes_KC, interpret=True)
    expected_score_N, expected_N = quantizer._best_by_chunks(z_NC, codes_KC)
    np.testing.assert_array_equal(code_N, expected_N)
    np.testing.assert_allclose(score_N, expected_score_N, atol=3e-7)
    assert score_N[0] < 0 and code_N[1] == 0


def test_pieces_are_exact():
    """Three bfloat16 hold a float32, even if a compiler drops conversions there and back."""
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    pieces = jax.jit(nearest_kernel._pieces)(x)
    assert (sum(np.float64(p) for p in pieces) == x).all()
    for piece in pieces:
        assert (np.float32(piece.astype(jnp.bfloat16)) == piece).all()


@pytest.mark.parametrize("tokens", [1, 128, 129, 2720, 21_760, 600_000])
@pytest.mark.parametrize("channels", [1, 40, 128, 512])
def test_blocks_fit(tokens, channels):
    for codes in (1, 500, 2048, 131_072):
        n, k = nearest_kernel._block_sizes(tokens, codes, channels)
        assert n % 128 == k % 128 == 0 and k % nearest_kernel._side_by_side(n) == 0
        assert 4 * n * k + 12 * channels * (n + 2 * k) <= nearest_kernel._VMEM
        assert n <= tokens + 127 and k <= codes + 127  # no block is larger than what it is cut from
    assert nearest_kernel._block_sizes(tokens, 2048, 8192) is None


def test_the_choice(monkeypatch):
    z_NC, codes_KC = draw(2048, 2048, 40)

    def kernels(mode, platform="tpu", tokens=2048):
        monkeypatch.setenv(nearest_kernel.VARIABLE, mode)
        traced = jax.jit(lambda *x: quantizer.nearest_codes(*x, 32)).trace(z_NC[:tokens], codes_KC)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert kernels("auto") == kernels("always") == kernels("always", tokens=8) == 1
    assert kernels("never") == kernels("auto", tokens=8) == 0
    assert kernels("auto", "cpu") == kernels("always", "cuda") == 0
    with pytest.raises(ValueError, match="must be one of auto"):
        kernels("perhaps")
    # More devices than one and no mesh in use: a kernel could not be compiled for all of them.
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert kernels("auto") == 0 and kernels("always") == 1


def test_the_quantizer_gives_the_same_codes_and_gradients():
    """With the kernel interpreted: on one device, tokens on eight, tokens and codes on eight."""
    for result in run("interpret", JAX_NUM_CPU_DEVICES="8"):
        assert result["codes_that_differ"] == 0, result
        assert max(result["gradients"]) < 1e-5, result


def check(topology, *programs):
    assert importlib.util.find_spec("libtpu"), (
        "this test compiles for TPUs with libtpu: pip install libtpu (no TPU is needed)"
    )
    for result in run(topology, *programs, **chips.COMPILER_ONLY):
        assert result["kernel"], result
        assert result["temporaries"] < MOST_TEMPORARIES, result
        assert not result.get("gathers"), result


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_for(topology):
    check(topology, "forward:32768:1", "gradient:131072:1")


@pytest.mark.slow
def test_compiles_for_several_chips():
    check("v5e:2x2", "forward:32768:4", "gradient:131072:4")
    check("v6e:2x2", "gradient:131072:4")  # programs for the others cannot be printed


@pytest.fixture
def unproved():
    nearest_kernel.proves_itself.cache_clear()
    yield
    nearest_kernel.proves_itself.cache_clear()


def wrong_code(*arguments, **options):
    score_N, code_N = BEST_OF(*arguments, **options)
    return score_N, code_N.at[17].add(1)


def wrong_score(*arguments, **options):
    score_N, code_N = BEST_OF(*arguments, **options)
    return score_N.at[17].set(jnp.nan), code_N


def no_memory(*arguments, **options):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of\nVMEM")


BEST_OF = nearest_kernel.best_of


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (BEST_OF, None),
        (wrong_code, "off by"),
        (wrong_score, "off by nan"),
        (no_memory, "out of VMEM"),
    ],
)
def test_the_kernel_proves_itself_or_is_not_used(monkeypatch, caplog, unproved, kernel, problem):
    """Also while a program is traced, where the choice is made."""
    monkeypatch.setattr(nearest_kernel, "best_of", kernel)
    found = []

    @jax.jit
    def traced(x):
        found.append(nearest_kernel.proves_itself(interpret=True))
        return x

    traced(1.0)
    assert found == [problem is None] and nearest_kernel.proves_itself(interpret=True) in found
    assert caplog.text.count("is not used here") == (problem is not None)
    assert (problem or "") in caplog.text


def test_on_a_tpu_the_kernel_is_chosen_only_if_it_proves_itself(monkeypatch):
    monkeypatch.delenv(nearest_kernel.VARIABLE, raising=False)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    arrays = (
        jax.ShapeDtypeStruct((4096, 40), jnp.float32),
        jax.ShapeDtypeStruct((2048, 40), jnp.float32),
    )
    for backend, proved, kernel in (
        ("tpu", False, False),
        ("tpu", True, True),
        ("cpu", False, True),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(nearest_kernel, "proves_itself", lambda proved=proved: proved)
        chosen = nearest_kernel.where_faster(*arrays, quantizer._best_by_chunks)
        assert (chosen is not quantizer._best_by_chunks) == kernel  # compiling for others needs it
