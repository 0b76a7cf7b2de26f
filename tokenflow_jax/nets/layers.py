"""Transformer parts shared by the vision encoders and decoders and by the language model."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.parallel.placement import on_batch


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) through the error function (jax.nn.gelu is the tanh approximation by default)."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, the activation of SigLIP."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "gelu_tanh": tanh_gelu,
}


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with PyTorch's two-pass variance; statistics in float32 whatever the dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dot_product_attention(q_BLHD: jax.Array, k_BLHD: jax.Array, v_BLHD: jax.Array) -> jax.Array:
    """Full softmax attention: the one place where the vision models choose their kernel.

    Args:
      q_BLHD, k_BLHD, v_BLHD: (batch, length, heads, head width), any one dtype.

    Returns:
      (batch, length, heads, head width); the softmax is float32.
    """
    return jax.nn.dot_product_attention(q_BLHD, k_BLHD, v_BLHD)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 whatever the dtype.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result.
    """

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def rope(positions_BL: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles: float32 (B, L, 1, head_width // 2) each."""
    half = head_width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHD: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs of channels (j, j + D / 2) by the angles of `rope`."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x_BLHD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection.

    Attributes:
      heads: number of heads; must divide the width.
      qv_bias: "full" adds one bias to q, k and v (CLIP); "qv" adds biases to q and v only (BEiT).
      dtype: computation dtype.
    """

    heads: int
    qv_bias: str = "full"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width = x_BLD.shape[-1]
        qkv = nn.Dense(3 * width, use_bias=self.qv_bias == "full", dtype=self.dtype, name="qkv")(
            x_BLD
        )
        if self.qv_bias == "qv":
            q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
            qkv += jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, width // self.heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        out = dot_product_attention(q, k, v).reshape(x_BLD.shape)
        return nn.Dense(width, dtype=self.dtype, name="out")(out)


class MLP(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      width: of the hidden layer; 0 takes four times the input's.
      activation: a key of `ACTIVATIONS`.
      dtype: computation dtype.
    """

    width: int = 0
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        features = x_BLD.shape[-1]
        hidden = nn.Dense(self.width or 4 * features, dtype=self.dtype, name="fc1")(x_BLD)
        hidden = on_batch(ACTIVATIONS[self.activation](hidden), "mlp")
        return nn.Dense(features, dtype=self.dtype, name="fc2")(hidden)


class GatedMLP(nn.Module):
    """norm, then activation(gate) * value, then a dense layer (ViTamin's GeGLU).

    Attributes:
      width: of gate and value; 0 takes twice the input's.
      activation, dtype: see `MLP`.
      epsilon: of its own LayerNorm, which follows the block's.
    """

    width: int = 0
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        features = x_BLD.shape[-1]
        x_BLD = layer_norm(self.epsilon, self.dtype, "norm")(x_BLD)
        gate, value = (
            nn.Dense(self.width or 2 * features, dtype=self.dtype, name=name)(x_BLD)
            for name in ("gate", "value")
        )
        hidden = on_batch(ACTIVATIONS[self.activation](gate) * value, "mlp")
        return nn.Dense(features, dtype=self.dtype, name="out")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block; returns (output, None), the form that `nn.scan` wants.

    Attributes:
      heads, qv_bias: see `Attention`.
      mlp_width, activation: see `MLP`.
      gated: takes `GatedMLP`.
      epsilon: of both norms.
      dtype: computation dtype.
    """

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
