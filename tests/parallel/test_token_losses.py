"""Cross entropies in pieces: against the plain form, their memory, and on eight fake devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.parallel.token_losses import project, token_losses

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("tokens, bounds", [(1, ()), (10, ()), (17, (7, 15)), (1000, (12,))])
def test_losses_and_gradients_equal_the_plain_form(tokens, bounds):
    """Also where labels compete with the ids of their own part of the vocabulary only."""
    keys = jax.random.split(jax.random.key(3), 4)
    hidden = jax.random.normal(keys[0], (3, 11, 6))
    kernel = jax.random.normal(keys[1], (6, 19))
    labels = jax.random.randint(keys[2], (3, 11), -5, 19)
    weights = jax.random.uniform(keys[3], (3, 11))

    def plain(hidden, kernel):
        logits, part = (
            project(hidden, kernel, jnp.float32),
            np.searchsorted(bounds, range(19), "right"),
        )
        logits = jnp.where(part == part[jnp.maximum(labels, 0)][..., None], logits, -jnp.inf)
        log_probabilities = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        losses = jnp.where(labels >= 0, -own, 0.0)
        return (losses * weights).sum(), losses

    def pieces(hidden, kernel):
        losses, _ = token_losses(hidden, kernel, labels, tokens, bounds=bounds)
        return (losses * weights).sum(), losses

    (_, losses), gradients = jax.value_and_grad(pieces, (0, 1), has_aux=True)(hidden, kernel)
    (_, wanted), wanted_gradients = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, kernel)
    np.testing.assert_allclose(losses, wanted, atol=1e-6)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_right_predictions_are_marked():
    hidden = jax.random.normal(jax.random.key(0), (2, 7, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 13))
    best = jnp.argmax(hidden @ kernel, -1)
    labels = best.at[0, 2].set(-100).at[1, 3].set((best[1, 3] + 1) % 13)
    losses, right = token_losses(hidden, kernel, labels, 5)
    want = np.ones((2, 7), bool)
    want[0, 2] = want[1, 3] = False
    np.testing.assert_array_equal(right, want)
    assert losses[0, 2] == 0 and (np.asarray(losses) >= 0).all()


def test_ties_go_to_the_lowest_id():
    _, right = token_losses(jnp.ones((1, 3, 2)), jnp.ones((2, 4)), jnp.array([[0, 1, 3]]))
    assert right.tolist() == [[True, False, False]]


def test_memory_for_logits_does_not_grow_with_the_sequence():
    """Temporaries of loss and gradient, for 1,024 and 4,096 positions of 16,384 scores each."""
    vocabulary, width = 16384, 16

    def temporaries(length):
        def total(hidden, kernel, labels):
            return token_losses(hidden, kernel, labels, 256)[0].sum()

        shapes = (
            jax.ShapeDtypeStruct((1, length, width), jnp.float32),
            jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
        )
        compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert short > 256 * vocabulary * 4  # logits of one piece are there
    assert long - short < 3072 * vocabulary * 4 / 20


def test_a_frozen_head_costs_no_gradient():
    """Stage 1 trains the projector alone: the sum that would become the head's gradient is gone."""
    width, vocabulary = 256, 16384
    shapes = (
        jax.ShapeDtypeStruct((1, 64, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, 64), jnp.int32),
    )

    def temporaries(arguments):
        def total(hidden, kernel, labels):
            return token_losses(hidden, kernel, labels, 16)[0].sum()

        compiled = jax.jit(jax.grad(total, arguments)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    head = width * vocabulary * 4
    assert temporaries((0,)) < head / 2 < head < temporaries((0, 1))


def test_eight_devices_agree_and_gather_the_head_once():
    # 64 ids split over tensor, 63 do not; 8 rows split over all axes but tensor.
    meshes = ("1,8,1,1:64", "1,1,8,1:64", "1,1,1,8:64", "1,2,2,2:64", "2,2,1,2:63")
    meshes = (*meshes, "1,2,2,2:64:24")  # labels compete within two parts of the vocabulary
    arguments = ("none:64", "none:63", "none:64:24", *meshes)
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
    }
    command = [sys.executable, str(HELPERS / "token_losses_program.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = dict(zip(arguments, map(json.loads, done.stdout.splitlines()), strict=True))
    for name in meshes:
        got, want = results[name], results["none:" + name.split(":", 1)[1]]
        np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5, atol=1e-6)
        assert got["right"] == want["right"], name
        for mine, theirs in zip(got["gradients"], want["gradients"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)
    # The head is gathered forward and backward and its gradient summed: three times its size in
    # all, not for each of the six pieces.
    assert results["1,1,8,1:64"]["bytes"] < 3.1 * 16 * 64 * 4
    assert results["1,8,1,1:64"]["bytes"] < 1.1 * 16 * 64 * 4
