"""Area and bicubic resizing exactly as PyTorch computes them, as fixed matrices.

The residual pyramid lives on grids of at most a few dozen cells, so every resize is two small
matrix products (rows, columns) with matrices that are constants of the compiled program. That is
exact, differentiable, and runs on the matrix unit of any accelerator.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_CUBIC_A = -0.75  # PyTorch's cubic coefficient (PIL and jax.image use -0.5)


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Return the float32 (size_out, size_in) matrix of adaptive average pooling."""
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        # Cells from floor(i n / m) up to ceil((i + 1) n / m): they overlap unless m divides n.
        start = i * size_in // size_out
        stop = -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.astype(np.float32)


def _cubic(x: float) -> float:
    """Keys' cubic convolution kernel at distance x."""
    x = abs(x)
    if x <= 1:
        return ((_CUBIC_A + 2) * x - (_CUBIC_A + 3)) * x * x + 1
    if x < 2:
        return ((_CUBIC_A * x - 5 * _CUBIC_A) * x + 8 * _CUBIC_A) * x - 4 * _CUBIC_A
    return 0.0


@functools.cache
def bicubic_matrix(size_in: int, size_out: int, scale: float | None = None) -> np.ndarray:
    """Return the float32 (size_out, size_in) matrix of bicubic interpolation, not antialiased.

    Centers are half pixels and edge cells repeat. `scale` is output cells per input cell, size_out
    / size_in by default; PyTorch samples with the `scale_factor` that it is called with.
    """
    step = 1 / scale if scale else size_in / size_out
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        center = (i + 0.5) * step - 0.5
        base = math.floor(center)
        for tap in range(base - 1, base + 3):
            matrix[i, min(max(tap, 0), size_in - 1)] += _cubic(center - tap)
    return matrix.astype(np.float32)


def _apply(matrix: np.ndarray, maps_BHWC: jax.Array) -> jax.Array:
    matrix = jnp.asarray(matrix, maps_BHWC.dtype)
    return jnp.einsum("yh,xw,bhwc->byxc", matrix, matrix, maps_BHWC, precision="highest")


def area_resize(maps_BHWC: jax.Array, size: int) -> jax.Array:
    """Resize square maps (B, n, n, C) to (B, size, size, C) by adaptive average pooling."""
    if maps_BHWC.shape[1] == size:
        return maps_BHWC
    return _apply(area_matrix(maps_BHWC.shape[1], size), maps_BHWC)


def bicubic_resize(maps_BHWC: jax.Array, size: int, scale: float | None = None) -> jax.Array:
    """Resize square maps (B, n, n, C) to (B, size, size, C), which may overshoot their range.

    For `scale` see `bicubic_matrix`.
    """
    if maps_BHWC.shape[1] == size and scale is None:
        return maps_BHWC
    return _apply(bicubic_matrix(maps_BHWC.shape[1], size, scale), maps_BHWC)
