"""The rotation against complex numbers."""

import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.layers import rope, rotate


def test_axes_take_turns_at_the_frequencies():
    rng = np.random.default_rng(0)
    positions, x = rng.uniform(0, 50, (2, 5, 3)), rng.normal(size=(2, 5, 4, 14))
    want = x[..., :7] + 1j * x[..., 7:]
    for j in range(7):
        angle = positions[..., j % 3] * 100 ** (-j / 7)
        want[..., j] *= np.exp(1j * angle)[..., None]
    got = rotate(jnp.asarray(x, jnp.float32), rope(jnp.asarray(positions, jnp.float32), 14, 100))
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=2e-5)
    # Equal positions on all axes are those of one.
    one = jnp.asarray(positions[..., :1])
    for axes, single in zip(
        rope(jnp.tile(one, 3), 14, 100), rope(one[..., 0], 14, 100), strict=True
    ):
        np.testing.assert_array_equal(axes, single)
