"""Cross entropy over a large vocabulary in pieces: logits of all tokens never exist at once.

On a mesh each device works on its own rows, with the columns of the head that the axis "tensor"
gives it. The head is gathered once, forward and backward, and its gradient is added up on each
device before it travels: a loop that left this to XLA would do both for every piece.

Shapes: B rows of L tokens, C channels, V ids; in lower case what is a device's own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenflow_jax.parallel.placement import axes_of

Axes = tuple[str, ...]


def project(hidden_BLC: jax.Array, kernel_CV: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """hidden @ kernel with operands of `dtype`; float32 (B, L, V)."""
    return _product("blc,cv->blv", dtype, hidden_BLC, kernel_CV)


def token_losses(
    hidden_BLC: jax.Array,
    kernel_CV: jax.Array,
    labels_BL: jax.Array,
    tokens: int = 4096,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every token, without ever holding the logits of all of them.

    The tokens are worked off in pieces along L, forward and backward, so that the memory for logits
    is `tokens` x V per device, whatever the batch and the length.

    Args:
      hidden_BLC: after the final norm.
      kernel_CV: the head.
      labels_BL: int, the id that each position is to predict (already shifted); negative for none.
      tokens: of one piece, over the rows of a device; one position of each row is the least.
      dtype: of the operands of the products.

    Returns:
      losses_BL: float32, 0 where there is no label.
      right_BL: bool, whether the label has the highest score; False where there is no label.
    """
    return _token_losses(tokens, jnp.dtype(dtype), hidden_BLC, kernel_CV, labels_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_losses(tokens, dtype, hidden_BLC, kernel_CV, labels_BL):
    (losses_BL, right_BL), _ = _forward(tokens, dtype, hidden_BLC, kernel_CV, labels_BL)
    return losses_BL, right_BL


def _forward(tokens, dtype, hidden_BLC, kernel_CV, labels_BL):
    split = _Split.of(hidden_BLC, kernel_CV)
    run = split.map(
        functools.partial(_losses, split, tokens, dtype),
        (split.rows, split.kernel, split.rows),
        (split.rows,) * 3,
    )
    losses_BL, right_BL, norms_BL = run(hidden_BLC, kernel_CV, labels_BL)
    return (losses_BL, right_BL), (hidden_BLC, kernel_CV, labels_BL, norms_BL)


def _backward(tokens, dtype, saved, cotangents):
    split = _Split.of(*saved[:2])
    run = split.map(
        functools.partial(_gradients, split, tokens, dtype),
        (split.rows, split.kernel, *(split.rows,) * 3),
        (split.rows, split.kernel),
    )
    return *run(*saved, cotangents[0]), None


_token_losses.defvjp(_forward, _backward)


class _Split(NamedTuple):
    """Mesh axes that the rows, and the head's channels and ids, are split over."""

    batch: Axes
    embed: Axes
    vocabulary: Axes

    @classmethod
    def of(cls, hidden_BLC: jax.Array, kernel_CV: jax.Array) -> "_Split":
        batch = axes_of("batch", hidden_BLC.shape[0])
        channels, ids = kernel_CV.shape
        # Rows that every device has in full give gradients that are not to be added up.
        embed = axes_of("embed", channels) if batch else ()
        return cls(batch, embed, axes_of("vocabulary", ids))

    @property
    def rows(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None)

    @property
    def kernel(self) -> PartitionSpec:
        return PartitionSpec(self.embed or None, self.vocabulary or None)

    def map(self, function, in_specs, out_specs):
        if not any(self):
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def gather(self, kernel_cv: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """All channels of the head, in the dtype of the products."""
        kernel_cv = kernel_cv.astype(dtype)
        if not self.embed:
            return kernel_cv
        return jax.lax.all_gather(kernel_cv, self.embed, axis=0, tiled=True)

    def scatter(self, gradient_Cv: jax.Array) -> jax.Array:
        """The sum over all rows, of a device's own channels."""
        if self.embed:
            gradient_Cv = jax.lax.psum_scatter(
                gradient_Cv, self.embed, scatter_dimension=0, tiled=True
            )
        rest = tuple(axis for axis in self.batch if axis not in self.embed)
        return jax.lax.psum(gradient_Cv, rest) if rest else gradient_Cv

    def over_ids(self, reduce, x: jax.Array) -> jax.Array:
        return reduce(x, self.vocabulary) if self.vocabulary else x

    def ids(self, count: int) -> jax.Array:
        """Those of a device's columns."""
        first = count * jax.lax.axis_index(self.vocabulary) if self.vocabulary else 0
        return first + jnp.arange(count)


def _losses(split, tokens, dtype, hidden_bLC, kernel_cv, labels_bL):
    """A device's losses, whether its labels score highest, and the log of what scores add up to."""
    kernel_Cv = split.gather(kernel_cv, dtype)
    ids_v = split.ids(kernel_Cv.shape[1])

    def piece(_, inputs):
        hidden_blC, labels_bl = inputs
        logits_blv = project(hidden_blC, kernel_Cv, dtype)
        top_bl = split.over_ids(jax.lax.pmax, logits_blv.max(-1))
        total_bl = jnp.exp(logits_blv - top_bl[..., None]).sum(-1)
        norms_bl = top_bl + jnp.log(split.over_ids(jax.lax.psum, total_bl))
        own_blv = ids_v == labels_bl[..., None]
        own_bl = split.over_ids(jax.lax.psum, jnp.where(own_blv, logits_blv, 0.0).sum(-1))
        tied_blv = jnp.where(logits_blv == top_bl[..., None], ids_v, jnp.iinfo(jnp.int32).max)
        best_bl = split.over_ids(jax.lax.pmin, tied_blv.min(-1))
        losses_bl = jnp.where(labels_bl >= 0, norms_bl - own_bl, 0.0)
        return None, (losses_bl, best_bl == labels_bl, norms_bl)

    pieces = _Pieces(*labels_bL.shape, tokens)
    _, out = jax.lax.scan(piece, None, (pieces.cut(hidden_bLC), pieces.cut(labels_bL, -1)))
    return tuple(map(pieces.join, out))


def _gradients(split, tokens, dtype, hidden_bLC, kernel_cv, labels_bL, norms_bL, cotangents_bL):
    """Gradients of a device's rows and of its part of the head."""
    kernel_Cv = split.gather(kernel_cv, dtype)
    ids_v = split.ids(kernel_Cv.shape[1])

    def piece(kernel_gradient_Cv, inputs):
        hidden_blC, labels_bl, norms_bl, cotangents_bl = inputs
        logits_blv = project(hidden_blC, kernel_Cv, dtype)
        own_blv = ids_v == labels_bl[..., None]
        scale_bl1 = jnp.where(labels_bl >= 0, cotangents_bl, 0.0)[..., None]
        gradient_blv = (jnp.exp(logits_blv - norms_bl[..., None]) - own_blv) * scale_bl1
        hidden_gradient_blC = _product("blv,cv->blc", dtype, gradient_blv, kernel_Cv)
        kernel_gradient_Cv += _product("blc,blv->cv", dtype, hidden_blC, gradient_blv)
        return kernel_gradient_Cv, split.over_ids(jax.lax.psum, hidden_gradient_blC)

    pieces = _Pieces(*labels_bL.shape, tokens)
    inputs = (
        pieces.cut(hidden_bLC), pieces.cut(labels_bL, -1), pieces.cut(norms_bL),
        pieces.cut(cotangents_bL),
    )  # fmt: skip
    zeros_Cv = jnp.zeros(kernel_Cv.shape, jnp.float32)
    kernel_gradient_Cv, out = jax.lax.scan(piece, zeros_Cv, inputs)
    kernel_gradient_cv = split.scatter(kernel_gradient_Cv).astype(kernel_cv.dtype)
    return pieces.join(out).astype(hidden_bLC.dtype), kernel_gradient_cv


class _Pieces:
    """Cuts (B, L, ...) along L into equal pieces (count, B, size, ...), and joins them again."""

    def __init__(self, batch: int, length: int, tokens: int):
        self.length = length
        size = max(1, min(length, tokens // batch))
        self.count = -(-length // size)
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
    """einsum with operands of `dtype`; float32."""
    return jnp.einsum(terms, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
