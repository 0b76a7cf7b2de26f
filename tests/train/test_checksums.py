"""Checksums: the same on the host and on devices, and blind to nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.train import checksums

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.standard_normal((300, 257)).astype(np.float32),
    "bfloat16": np.asarray(jnp.asarray(RNG.standard_normal((7, 5, 3)), jnp.bfloat16)),
    "bytes": RNG.integers(0, 256, 1001).astype(np.uint8),
    "flags": RNG.random(50) < 0.5,
    "integers": RNG.integers(-5, 5, (4, 4)).astype(np.int32),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "not contiguous": RNG.standard_normal((64, 32)).astype(np.float32).T[::2],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_device_and_host_agree(name):
    on_device = jax.jit(checksums._sum32)(ARRAYS[name])
    assert int(on_device) == checksums.sum32(ARRAYS[name])


def test_a_definition_in_plain_integers():
    array = np.array([1.0, -2.5, 0.0], np.float32)
    total = 0
    for i, word in enumerate(array.view(np.uint32).tolist()):
        h = (word + i * 0x9E3779B9) % 2**32
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        total += h ^ h >> 16
    assert checksums.sum32(array) == total % 2**32


def test_every_flipped_bit_and_exchanged_elements_show():
    array = RNG.standard_normal(100).astype(np.float32)
    good = checksums.sum32(array)
    for bit in range(32):
        damaged = array.copy()
        damaged.view(np.uint32)[bit * 3] ^= np.uint32(1 << bit)
        assert checksums.sum32(damaged) != good
    swapped = array[[1, 0, *range(2, 100)]]
    assert checksums.sum32(swapped) != good
    # Zeros count as well: an array cut short is another one.
    assert checksums.sum32(np.zeros(3)) != checksums.sum32(np.zeros(4))


def test_random_keys_and_mixed_lists():
    key = jax.random.key(3)
    leaves = [ARRAYS["matrix"], key, jnp.asarray(ARRAYS["integers"])]
    sums = checksums.sums_of(leaves)
    assert sums[0] == checksums.sum32(ARRAYS["matrix"])
    assert sums[1] == checksums.sum32(np.asarray(jax.random.key_data(key)))
    assert sums[2] == checksums.sum32(ARRAYS["integers"])
