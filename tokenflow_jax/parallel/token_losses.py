"""Cross entropy over a large vocabulary in pieces: the logits of all tokens never exist at once.

On a mesh each device works on its own rows, with the columns of the head that the axis "tensor"
gives it. The head is gathered once, forward and backward, and its gradient is added up on each
device before it travels; a loop that left this to XLA would do both for every piece.

Shapes: B rows of L tokens, C channels, V ids; lower case is one device's share.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenflow_jax.parallel.placement import axes_of

Axes = tuple[str, ...]


def project(hidden_BLC: jax.Array, kernel_CV: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute hidden @ kernel with operands of `dtype`: float32 (B, L, V)."""
    return _product("blc,cv->blv", dtype, hidden_BLC, kernel_CV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_losses(
    hidden_BLC: jax.Array,
    kernel_CV: jax.Array,
    labels_BL: jax.Array,
    tokens: int = 4096,
    dtype: jnp.dtype = jnp.float32,
    bounds: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Compute the cross entropy of every token, piece by piece along L.

    Args:
      labels_BL: int, the id that each position has to predict (already shifted); negative for none.
      tokens: tokens of one piece over the rows of a device, at least one position of each row. The
        memory for logits is tokens x V per device, whatever the batch and the length.
      dtype: of the operands of the products.
      bounds: ids that begin a part of the vocabulary, ascending; a label competes with the ids of
        its own part only.

    Returns:
      Float32 losses_BL, and bool right_BL: the label has the highest score. Without a label they
      are 0 and False.
    """
    return _forward(hidden_BLC, kernel_CV, labels_BL, tokens, dtype, bounds)[0]


def _forward(hidden_BLC, kernel_CV, labels_BL, tokens, dtype, bounds):
    split = _Split.of(hidden_BLC, kernel_CV)
    rows = split.rows
    ins, outs = (rows, split.kernel, rows), (rows, rows, rows)
    run = split.map(_losses, tokens, dtype, bounds, ins, outs)
    losses_BL, right_BL, norms_BL = run(hidden_BLC, kernel_CV, labels_BL)
    return (losses_BL, right_BL), (hidden_BLC, kernel_CV, labels_BL, norms_BL)


def _backward(tokens, dtype, bounds, saved, cotangents):
    split = _Split.of(*saved[:2])
    rows, kernel = split.rows, split.kernel
    ins, outs = (rows, kernel, rows, rows, rows), (rows, kernel)
    run = split.map(_gradients, tokens, dtype, bounds, ins, outs)
    return *run(*saved, cotangents[0]), None


token_losses.defvjp(_forward, _backward)


class _Split(NamedTuple):
    """Mesh axes that the rows, and the head's channels and ids, are split over."""

    batch: Axes
    embed: Axes
    vocabulary: Axes

    @classmethod
    def of(cls, hidden_BLC: jax.Array, kernel_CV: jax.Array) -> "_Split":
        batch = axes_of("batch", hidden_BLC.shape[0])
        channels, ids = kernel_CV.shape
        # Gradients of rows that every device has in full must not be added up.
        embed = axes_of("embed", channels) if batch else ()
        return cls(batch, embed, axes_of("vocabulary", ids))

    @property
    def rows(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None)

    @property
    def kernel(self) -> PartitionSpec:
        return PartitionSpec(self.embed or None, self.vocabulary or None)

    def map(self, function: Callable, tokens: int, dtype, bounds, ins, outs) -> Callable:
        """Return the function of (split, tokens, dtype, bounds, *arrays) as one of whole arrays."""
        local = functools.partial(function, self, tokens, dtype, bounds)
        if not any(self):
            return local
        return jax.shard_map(local, in_specs=ins, out_specs=outs, check_vma=False)

    def gather(self, kernel_cv: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Return all channels of the head, in the dtype of the products."""
        kernel_cv = kernel_cv.astype(dtype)
        if not self.embed:
            return kernel_cv
        return jax.lax.all_gather(kernel_cv, self.embed, axis=0, tiled=True)

    def scatter(self, gradient_Cv: jax.Array) -> jax.Array:
        """Sum over all rows, for a device's own channels."""
        if self.embed:
            gradient_Cv = jax.lax.psum_scatter(
                gradient_Cv, self.embed, scatter_dimension=0, tiled=True
            )
        rest = tuple(axis for axis in self.batch if axis not in self.embed)
        return jax.lax.psum(gradient_Cv, rest) if rest else gradient_Cv

    def over_ids(self, reduce, x: jax.Array) -> jax.Array:
        return reduce(x, self.vocabulary) if self.vocabulary else x

    def ids(self, count: int) -> jax.Array:
        """Return the ids of a device's columns."""
        first = count * jax.lax.axis_index(self.vocabulary) if self.vocabulary else 0
        return first + jnp.arange(count)


def _within_part(logits_blv, ids_v, labels_bl, bounds):
    """Leave -inf for ids of other parts of the vocabulary than the label's."""
    if not bounds:
        return logits_blv

    def part(ids):
        return sum((ids >= bound).astype(jnp.int32) for bound in bounds)

    return jnp.where(part(ids_v) == part(labels_bl)[..., None], logits_blv, -jnp.inf)


def _losses(split, tokens, dtype, bounds, hidden_bLC, kernel_cv, labels_bL):
    """Return a device's losses, hits (the label scores highest), and log-sum-exp norms."""
    kernel_Cv = split.gather(kernel_cv, dtype)
    ids_v = split.ids(kernel_Cv.shape[1])

    def piece(_, inputs):
        hidden_blC, labels_bl = inputs
        logits_blv = _within_part(project(hidden_blC, kernel_Cv, dtype), ids_v, labels_bl, bounds)
        top_bl = split.over_ids(jax.lax.pmax, logits_blv.max(-1))
        total_bl = jnp.exp(logits_blv - top_bl[..., None]).sum(-1)
        norms_bl = top_bl + jnp.log(split.over_ids(jax.lax.psum, total_bl))
        own_blv = ids_v == labels_bl[..., None]
        own_bl = split.over_ids(jax.lax.psum, jnp.where(own_blv, logits_blv, 0.0).sum(-1))
        tied_blv = jnp.where(logits_blv == top_bl[..., None], ids_v, jnp.iinfo(jnp.int32).max)
        best_bl = split.over_ids(jax.lax.pmin, tied_blv.min(-1))  # the first of equal scores
        losses_bl = jnp.where(labels_bl >= 0, norms_bl - own_bl, 0.0)
        return None, (losses_bl, best_bl == labels_bl, norms_bl)

    pieces = _Pieces(*labels_bL.shape, tokens)
    _, out = jax.lax.scan(piece, None, (pieces.cut(hidden_bLC), pieces.cut(labels_bL, -1)))
    return tuple(map(pieces.join, out))


def _gradients(split, tokens, dtype, bounds, *arrays):
    """Return the gradients of a device's rows and of its part of the head."""
    hidden_bLC, kernel_cv, labels_bL, norms_bL, cotangents_bL = arrays
    kernel_Cv = split.gather(kernel_cv, dtype)
    ids_v = split.ids(kernel_Cv.shape[1])

    def piece(kernel_gradient_Cv, inputs):
        hidden_blC, labels_bl, norms_bl, cotangents_bl = inputs
        logits_blv = _within_part(project(hidden_blC, kernel_Cv, dtype), ids_v, labels_bl, bounds)
        own_blv = ids_v == labels_bl[..., None]
        scale_bl1 = jnp.where(labels_bl >= 0, cotangents_bl, 0.0)[..., None]
        gradient_blv = (jnp.exp(logits_blv - norms_bl[..., None]) - own_blv) * scale_bl1
        hidden_gradient_blC = _product("blv,cv->blc", dtype, gradient_blv, kernel_Cv)
        kernel_gradient_Cv += _product("blc,blv->cv", dtype, hidden_blC, gradient_blv)
        return kernel_gradient_Cv, split.over_ids(jax.lax.psum, hidden_gradient_blC)

    pieces = _Pieces(*labels_bL.shape, tokens)
    hidden, labels = pieces.cut(hidden_bLC), pieces.cut(labels_bL, -1)
    inputs = (hidden, labels, pieces.cut(norms_bL), pieces.cut(cotangents_bL))
    zeros_Cv = jnp.zeros(kernel_Cv.shape, jnp.float32)
    kernel_gradient_Cv, out = jax.lax.scan(piece, zeros_Cv, inputs)
    kernel_gradient_cv = split.scatter(kernel_gradient_Cv).astype(kernel_cv.dtype)
    return pieces.join(out).astype(hidden_bLC.dtype), kernel_gradient_cv


class _Pieces:
    """Cuts (B, L, ...) along L into equal pieces (count, B, size, ...), and joins them again."""

    def __init__(self, batch: int, length: int, tokens: int):
        self.length = length
        self.count = -(-length // max(1, min(length, tokens // batch)))
        # Pieces of equal size cost at most a few positions more.
        self.size = -(-length // self.count)

    def cut(self, x: jax.Array, padding: int = 0) -> jax.Array:
        extra = self.count * self.size - self.length
        widths = [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, widths, constant_values=padding)
        return jnp.moveaxis(x.reshape(x.shape[0], self.count, self.size, *x.shape[2:]), 1, 0)

    def join(self, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]


def _product(terms: str, dtype: jnp.dtype, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(terms, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
