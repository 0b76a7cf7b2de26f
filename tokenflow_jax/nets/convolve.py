"""Convolutions that XLA computes slowly on CPUs: of tiny maps, and weight gradients of large ones.

At 224 px and 128 channels XLA takes 1.3 s for a weight gradient, the products below 0.5 s; from
112 px down there is no gain, and forward the rewriting loses. Of 2 x 2 pixels and 512 channels, the
last maps of LPIPS at 32 px, it makes a convolution over channels: 280 ms for 8 pictures, as a
product 9 ms.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import placement

_FEW_PIXELS = 9  # of a map that counts as tiny, at most
_PIXELS = 128 * 128  # of a map that counts as large
_CHANNELS = 32  # of the result; with fewer the products are slower
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(x_BHWC: jax.Array, kernel_hwCK: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`lax.conv_general_dilated` of a 3x3 kernel that moves by one and pads by one."""
    pixels = x_BHWC.shape[1] * x_BHWC.shape[2]
    if placement.platform() == "cpu":
        if pixels <= _FEW_PIXELS:
            return _as_product(x_BHWC, kernel_hwCK)
        if pixels >= _PIXELS and kernel_hwCK.shape[3] >= _CHANNELS:
            return _by_products(x_BHWC, kernel_hwCK)
    return jax.lax.conv_general_dilated(x_BHWC, kernel_hwCK, *args, **options)


def _as_product(x_BHWC: jax.Array, kernel_hwCK: jax.Array) -> jax.Array:
    return jnp.concatenate(_shifted(x_BHWC), -1) @ kernel_hwCK.reshape(-1, kernel_hwCK.shape[-1])


def _shifted(x_BHWC: jax.Array) -> list[jax.Array]:
    """Return what each of the kernel's nine entries reads."""
    height, width = x_BHWC.shape[1:3]
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


@jax.custom_vjp
def _by_products(x_BHWC: jax.Array, kernel_hwCK: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel_hwCK, (1, 1), ((1, 1), (1, 1)), dimension_numbers=_DIMENSIONS
    )


def _forward(x_BHWC, kernel_hwCK):
    return _by_products(x_BHWC, kernel_hwCK), (x_BHWC, kernel_hwCK)


def _backward(kept, gradient_BHWK):
    x_BHWC, kernel_hwCK = kept
    gradient_NK = gradient_BHWK.reshape(-1, gradient_BHWK.shape[-1])
    sums = [x.reshape(-1, x.shape[-1]).T @ gradient_NK for x in _shifted(x_BHWC)]
    turned_hwKC = kernel_hwCK[::-1, ::-1].swapaxes(2, 3)
    return _by_products(gradient_BHWK, turned_hwKC), jnp.stack(sums).reshape(kernel_hwCK.shape)


_by_products.defvjp(_forward, _backward)
