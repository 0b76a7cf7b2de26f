"""The tokenizer's discriminators: PatchGAN (arXiv 1611.07004), and StyleGAN's (arXiv 1912.04958).

Both map images in [-1, 1] to logits, high for real ones.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.parallel.placement import on_batch


def _scale_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _torch_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for kernels and biases of dense and convolutional layers."""
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
        conv = nn.Conv(
            features,
            (4, 4),
            strides=stride,
            padding=1,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            # The reference resets the kernels only.
            bias_init=_torch_init(16 * x.shape[-1]),
            name=name,
        )
        return on_batch(conv(x))


def blur(x_BHWC: jax.Array) -> jax.Array:
    """Smooths with (1, 2, 1) / 4 along both axes, edges reflected."""
    for axis in (1, 2):
        pad = [(int(a == axis), int(a == axis)) for a in range(4)]
        padded, size = jnp.pad(x_BHWC, pad, mode="reflect"), x_BHWC.shape[axis]
        before, here, after = (
            jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)
        )
        x_BHWC = (before + 2 * here + after) / 4
    return x_BHWC


class StyleGAN(nn.Module):
    """StyleGAN2's residual discriminator, as the reference has it: without minibatch statistics.

    Blocks halve the image down to 4 x 4; channels double as the side halves, from 64 at 256 px up
    to `max_channels`.

    Attributes:
      max_channels: upper bound of channels.
      dtype: of the convolutions; logits are float32.
    """

    max_channels: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool) -> jax.Array:
        """Scores images.

        Args:
          images_BHWC: (B, H, H, 3) in [-1, 1], H a power of two from 8 on.
          train: changes nothing; every discriminator takes it.

        Returns:
          Logits (B, 1), float32.
        """
        del train
        batch, height, width, _ = images_BHWC.shape
        if height != width or height < 8 or height & (height - 1):
            raise ValueError(
                f"images of {height} x {width} pixels: the StyleGAN discriminator takes squares "
                "whose side is a power of two, 8 or more; use the PatchGAN"
            )
        act = functools.partial(nn.leaky_relu, negative_slope=0.2)
        x, side = images_BHWC.astype(self.dtype), height
        x = act(self._conv(x, self._channels(side), 3, 1, "conv_in"))
        i = 0
        while side > 4:
            side //= 2
            shortcut = self._conv(x, self._channels(side), 1, 2, f"block_{i}_shortcut")
            x = act(self._conv(x, self._channels(side), 3, 1, f"block_{i}_conv1"))
            x = act(self._conv(x, self._channels(side), 3, 1, f"block_{i}_conv2"))
            x = self._conv(blur(x), self._channels(side), 3, 2, f"block_{i}_down")
            x = on_batch((x + shortcut) * 2**-0.5)
            i += 1
        x = act(self._conv(x, self._channels(4), 3, 1, "conv_out"))
        x = x.transpose(0, 3, 1, 2).reshape(batch, -1)  # the order of PyTorch's weights
        x = act(self._dense(x, self._channels(4), "hidden"))
        return self._dense(x, 1, "out").astype(jnp.float32)

    def _channels(self, side: int) -> int:
        return min(self.max_channels, 64 * 256 // side)

    def _conv(self, x: jax.Array, features: int, kernel: int, stride: int, name: str) -> jax.Array:
        init = _torch_init(kernel * kernel * x.shape[-1])
        return nn.Conv(
            features,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            dtype=self.dtype,
            kernel_init=init,
            bias_init=init,
            name=name,
        )(x)

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        init = _torch_init(x.shape[-1])
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, bias_init=init, name=name)(x)


def make_discriminator(
    kind: str = "patchgan", filters: int = 64, layers: int = 3, dtype: jnp.dtype = jnp.float32
) -> PatchGAN | StyleGAN:
    """Builds a discriminator.

    Args:
      kind: "patchgan" or "stylegan".
      filters, layers: of the PatchGAN.
      dtype: of the convolutions.

    Raises:
      ValueError: an unknown kind.
    """
    if kind == "patchgan":
        return PatchGAN(filters, layers, dtype)
    if kind == "stylegan":
        return StyleGAN(dtype=dtype)
    raise ValueError(f"discriminator {kind!r} is not one of ['patchgan', 'stylegan']")
