"""Transformer layers of the vision encoders and decoders; the language model shares some."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.attention import SAVED
from tokenflow_jax.nets.convolve import convolve
from tokenflow_jax.parallel.placement import on_batch


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


# jax.nn.gelu is the tanh approximation by default; SigLIP wants it, all others the exact one.
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "gelu_tanh": tanh_gelu,
}
REMAT = ("none", "block", "dots")


def _dots_and_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    # cuDNN's results have no checkpoint names.
    return (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
        or jax.checkpoint_policies.save_only_these_names(SAVED)(primitive, *args, **params)
        or primitive.name.startswith("dot_product_attention_fwd")
    )


_SAVED = {"block": None, "dots": _dots_and_attention}


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with PyTorch's two-pass variance; statistics in float32 whatever the dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def conv3x3(
    features: int, dtype: jnp.dtype, name: str, stride: int = 1, groups: int = 1
) -> nn.Conv:
    """Convolution padded by one on every side, whatever the stride."""
    make = functools.partial(nn.Conv, features, (3, 3), stride, 1, dtype=dtype, name=name)
    if stride == groups == 1:
        return make(conv_general_dilated=convolve)
    return make(feature_group_count=groups)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32; the result is cast to `dtype`."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def rope(positions: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of the rotary angles, float32 (B, L, 1, head_width // 2) each.

    Of positions (B, L, axes) the axes take turns at the frequencies; (B, L) are those of one axis.
    """
    half = head_width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if positions.ndim == 2:
        positions = positions[..., None]
    else:
        positions = positions[..., jnp.arange(half) % positions.shape[-1]]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHD: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs of channels (j, j + D / 2) by the angles of `rope`."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x_BLHD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    heads: int
    qv_bias: str = "full"  # biases on q, k and v (CLIP), or "qv": on q and v only (BEiT)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width = x_BLD.shape[-1]
        full = self.qv_bias == "full"
        qkv = nn.Dense(3 * width, use_bias=full, dtype=self.dtype, name="qkv")(x_BLD)
        if self.qv_bias == "qv":
            q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
            qkv += jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        q_BLHD, k_BLHD, v_BLHD = (
            part.reshape(*part.shape[:2], self.heads, width // self.heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        out_BLD = jax.nn.dot_product_attention(q_BLHD, k_BLHD, v_BLHD).reshape(x_BLD.shape)
        return nn.Dense(width, dtype=self.dtype, name="out")(out_BLD)


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    width: int = 0  # hidden channels; 0: four times the input's
    activation: str = "gelu"  # a key of ACTIVATIONS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        channels = x_BLD.shape[-1]
        hidden = nn.Dense(self.width or 4 * channels, dtype=self.dtype, name="fc1")(x_BLD)
        hidden = on_batch(ACTIVATIONS[self.activation](hidden), "mlp")
        return nn.Dense(channels, dtype=self.dtype, name="fc2")(hidden)


class GatedMLP(nn.Module):
    """LayerNorm (a second one, after the block's), activation(gate) * value, dense: ViTamin's."""

    width: int = 0  # channels of gate and value; 0: twice the input's
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        channels = x_BLD.shape[-1]
        x_BLD = layer_norm(self.epsilon, self.dtype, "norm")(x_BLD)
        gate, value = (
            nn.Dense(self.width or 2 * channels, dtype=self.dtype, name=name)(x_BLD)
            for name in ("gate", "value")
        )
        hidden = on_batch(ACTIVATIONS[self.activation](gate) * value, "mlp")
        return nn.Dense(channels, dtype=self.dtype, name="out")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block; returns (output, None), the form that `nn.scan` wants."""

    heads: int
    mlp_width: int = 0
    activation: str = "gelu"
    gated: bool = False
    epsilon: float = 1e-6
    qv_bias: str = "full"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, None]:
        attention = Attention(self.heads, self.qv_bias, self.dtype, name="attention")
        x_BLD = on_batch(x_BLD + attention(layer_norm(self.epsilon, self.dtype, "norm1")(x_BLD)))
        mlp = (GatedMLP if self.gated else MLP)(
            self.mlp_width, self.activation, self.dtype, name="mlp"
        )
        return on_batch(x_BLD + mlp(layer_norm(self.epsilon, self.dtype, "norm2")(x_BLD))), None


def stack(block: type[nn.Module], depth: int, remat: str = "none", **scan: Any) -> Callable:
    """Repeat a block as one scanned module, so that compile time does not grow with depth.

    Each parameter gets a leading layer axis. The backward pass recomputes "none", the whole
    "block", or all but the results of attention and of matrix products with parameters ("dots").
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=_SAVED[remat])
    axes, rngs = {"params": 0}, {"params": True}
    return nn.scan(block, variable_axes=axes, split_rngs=rngs, length=depth, **scan)


def transformer(
    x_BLD: jax.Array, depth: int, remat: bool = False, unroll: int = 1, **fields: Any
) -> jax.Array:
    """Apply `depth` blocks with the fields of `Block`, as the child "blocks" of a compact method.

    `unroll` is blocks per iteration of the compiled loop; the parameters do not depend on it.
    """
    blocks = stack(Block, depth, "block" if remat else "none", unroll=unroll)
    return blocks(**fields, name="blocks")(on_batch(x_BLD))[0]


def put_vectors(vectors_BMNC: jax.Array, places_BL: jax.Array, inputs_BLC: jax.Array) -> jax.Array:
    """Put images' vectors where places, each one's index among the row's, are not negative."""
    vectors_BNC = vectors_BMNC.reshape(inputs_BLC.shape[0], -1, inputs_BLC.shape[-1])
    index_BL1 = jnp.maximum(places_BL, 0)[..., None]
    placed_BLC = jnp.take_along_axis(vectors_BNC, index_BL1, axis=1)
    return jnp.where(places_BL[..., None] >= 0, placed_BLC, inputs_BLC)
