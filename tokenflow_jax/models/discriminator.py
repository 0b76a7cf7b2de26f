"""PatchGAN (arXiv 1611.07004), with PyTorch's batch norm: the discriminator of the tokenizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def _scale_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for a convolution's bias; the reference resets the kernels only."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class BatchNorm(nn.Module):
    """Batch norm as PyTorch does it: normalises with the biased variance, remembers the unbiased.

    Statistics are over the whole batch in float32; under jit that is the global batch, however it
    is sharded. The running statistics are the collection `batch_stats`.

    Attributes:
      momentum: weight of the new batch in the running statistics (PyTorch's convention).
      epsilon: added to the variance.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        """Normalises per channel; in training updates `batch_stats` if it is mutable."""
        channels = x_BHWC.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", _scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        x = x_BHWC.astype(jnp.float32)
        mean_C, var_C = mean.value, var.value
        if train:
            count = x.size // x.shape[-1]
            if count < 2:
                raise ValueError(
                    "batch norm in training needs more than one value per channel; got input "
                    f"{x.shape}: use larger images or batches"
                )
            mean_C = x.mean((0, 1, 2))
            var_C = jnp.square(x - mean_C).mean((0, 1, 2))
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                mean.value += self.momentum * (jax.lax.stop_gradient(mean_C) - mean.value)
                unbiased_C = jax.lax.stop_gradient(var_C) * (count / (count - 1))
                var.value += self.momentum * (unbiased_C - var.value)
        x = (x - mean_C) * (jax.lax.rsqrt(var_C + self.epsilon) * scale) + bias
        return x.astype(x_BHWC.dtype)


class PatchGAN(nn.Module):
    """Judges overlapping patches of an image (70 px wide with three layers) as real or not.

    Attributes:
      filters: channels after the first convolution; doubled per layer, up to 8 times.
      layers: convolutions of stride 2.
      dtype: of the convolutions; batch norm and logits are float32.
    """

    filters: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool) -> jax.Array:
        """Scores patches.

        Args:
          images_BHWC: in [-1, 1]; with the default of three layers at least 24 px wide.
          train: normalise with the batch's statistics, and update the collection `batch_stats` if
            it is mutable; otherwise use the running ones.

        Returns:
          Logits (B, h, w, 1), float32, high for real; 26 x 26 for 224 px, 30 x 30 for 256 px.
        """
        smallest = min(images_BHWC.shape[1:3])
        least = 3 * 2**self.layers  # keeps two cells for the last two convolutions of stride 1
        if smallest < least:
            raise ValueError(
                f"images of {images_BHWC.shape[1:3]} pixels are too small for a PatchGAN of "
                f"{self.layers} layers, which needs {least}; use fewer layers"
            )
        x = images_BHWC.astype(self.dtype)
        x = nn.leaky_relu(self._conv(x, self.filters, 2, True, "conv_0"), 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = self._conv(x, self.filters * min(2**i, 8), stride, False, f"conv_{i}")
            x = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(x, train), 0.2)
        return self._conv(x, 1, 1, True, "conv_out").astype(jnp.float32)

    def _conv(self, x: jax.Array, features: int, stride: int, bias: bool, name: str) -> jax.Array:
        return nn.Conv(
            features,
            (4, 4),
            strides=stride,
            padding=1,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=_bias_init(16 * x.shape[-1]),
            name=name,
        )(x)
