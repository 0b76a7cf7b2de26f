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
    """Returns the (size_out, size_in) matrix of adaptive average pooling.

    Output cell i averages the inputs from floor(i n / m) up to ceil((i + 1) n / m), so cells
    overlap when the sizes do not divide.

    Args:
      size_in: number of input cells, n.
      size_out: number of output cells, m.

    Returns:
      A float32 matrix whose rows sum to one.
    """
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
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
    """Returns the (size_out, size_in) matrix of bicubic interpolation without antialiasing.

    Half-pixel centres, edge cells repeated.

    Args:
      size_in: number of input cells.
      size_out: number of output cells.
      scale: output cells per input cell; size_out / size_in unless given. PyTorch samples with the
        `scale_factor` it was called with, which the reference chooses slightly off (see `vit`).

    Returns:
      A float32 matrix whose rows sum to one.
    """
    step = 1 / scale if scale else size_in / size_out
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * step - 0.5
        base = math.floor(centre)
        for tap in range(base - 1, base + 3):
            matrix[i, min(max(tap, 0), size_in - 1)] += _cubic(centre - tap)
    return matrix.astype(np.float32)


def _apply(matrix: np.ndarray, maps_BHWC: jax.Array) -> jax.Array:
    matrix = jnp.asarray(matrix, maps_BHWC.dtype)
    return jnp.einsum("yh,xw,bhwc->byxc", matrix, matrix, maps_BHWC, precision="highest")


def area_resize(maps_BHWC: jax.Array, size: int) -> jax.Array:
    """Resizes square maps (B, n, n, C) to (B, size, size, C) by adaptive average pooling."""
    if maps_BHWC.shape[1] == size:
        return maps_BHWC
    return _apply(area_matrix(maps_BHWC.shape[1], size), maps_BHWC)


def bicubic_resize(maps_BHWC: jax.Array, size: int, scale: float | None = None) -> jax.Array:
    """Resizes square maps (B, n, n, C) to (B, size, size, C) bicubically, as PyTorch does.

    Args:
      maps_BHWC: square maps.
      size: side of the result.
      scale: see `bicubic_matrix`.

    Returns:
      The resized maps, in the dtype of the input; values may overshoot the input's range.
    """
    if maps_BHWC.shape[1] == size and scale is None:
        return maps_BHWC
    return _apply(bicubic_matrix(maps_BHWC.shape[1], size, scale), maps_BHWC)
