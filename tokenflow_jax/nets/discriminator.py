"""The tokenizer's discriminators: PatchGAN (arXiv 1611.07004), and StyleGAN's (arXiv 1912.04958).

Both map images in [-1, 1] to float32 logits, high for real ones.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.parallel.placement import on_batch


def _scale_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _torch_inits(fan_in: int) -> dict[str, nn.initializers.Initializer]:
    """PyTorch's default for kernels and biases of dense and convolutional layers."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": init, "bias_init": init}


class BatchNorm(nn.Module):
    """Batch norm as PyTorch does it: normalizes with the biased variance, remembers the unbiased.

    Statistics are over the whole batch in float32; under jit that is the global batch, however it
    is sharded. The running statistics are the collection `batch_stats`, updated in training if it
    is mutable.
    """

    momentum: float = 0.1  # weight of the new batch in the running statistics, as in PyTorch
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
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
    """Judges overlapping patches of an image (70 px wide with three layers) as real or not."""

    filters: int = 64  # channels after the first convolution; doubled per layer, up to 8 times
    layers: int = 3  # convolutions of stride 2
    dtype: jnp.dtype = jnp.float32  # of the convolutions

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool) -> jax.Array:
        """Return logits (B, h, w, 1): 26 x 26 for 224 px, 30 x 30 for 256 px.

        `train` normalizes with the batch's statistics, otherwise with the running ones.
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
        # The reference resets the kernels only; biases keep PyTorch's default.
        inits = _torch_inits(16 * x.shape[-1]) | {"kernel_init": nn.initializers.normal(0.02)}
        fields = inits | {"use_bias": bias, "dtype": self.dtype, "name": name}
        return on_batch(nn.Conv(features, (4, 4), stride, 1, **fields)(x))


def blur(x_BHWC: jax.Array) -> jax.Array:
    """Smooth with (1, 2, 1) / 4 along both axes, edges reflected."""
    x = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


class StyleGAN(nn.Module):
    """StyleGAN2's residual discriminator, as the reference has it: without minibatch statistics.

    Blocks halve the image down to 4 x 4; channels double as the side halves, from 64 at 256 px up
    to `max_channels`.
    """

    max_channels: int = 512
    dtype: jnp.dtype = jnp.float32  # of the convolutions

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool) -> jax.Array:
        """Return logits (B, 1) of images (B, H, H, 3), H a power of two from 8 on."""
        del train  # every discriminator takes it
        batch, height, width, _ = images_BHWC.shape
        if height != width or height < 8 or height & (height - 1):
            raise ValueError(
                f"images of {height} x {width} pixels: the StyleGAN discriminator takes squares "
                "whose side is a power of two, 8 or more; use the PatchGAN"
            )
        act = functools.partial(nn.leaky_relu, negative_slope=0.2)
        x = images_BHWC.astype(self.dtype)
        x = act(self._conv(x, self._channels(height), 3, 1, "conv_in"))
        for i in range(height.bit_length() - 3):
            channels = self._channels(x.shape[1] // 2)
            shortcut = self._conv(x, channels, 1, 2, f"block_{i}_shortcut")
            x = act(self._conv(x, channels, 3, 1, f"block_{i}_conv1"))
            x = act(self._conv(x, channels, 3, 1, f"block_{i}_conv2"))
            x = self._conv(blur(x), channels, 3, 2, f"block_{i}_down")
            x = on_batch((x + shortcut) * 2**-0.5)
        x = act(self._conv(x, self._channels(4), 3, 1, "conv_out"))
        x = x.transpose(0, 3, 1, 2).reshape(batch, -1)  # the order of PyTorch's weights
        x = act(self._dense(x, self._channels(4), "hidden"))
        return self._dense(x, 1, "out").astype(jnp.float32)

    def _channels(self, side: int) -> int:
        return min(self.max_channels, 64 * 256 // side)

    def _conv(self, x: jax.Array, features: int, kernel: int, stride: int, name: str) -> jax.Array:
        size, padding = (kernel, kernel), kernel // 2
        inits = _torch_inits(kernel**2 * x.shape[-1])
        return nn.Conv(features, size, stride, padding, dtype=self.dtype, name=name, **inits)(x)

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        inits = _torch_inits(x.shape[-1])
        return nn.Dense(features, dtype=self.dtype, name=name, **inits)(x)


def make_discriminator(
    kind: str = "patchgan", filters: int = 64, layers: int = 3, dtype: jnp.dtype = jnp.float32
) -> PatchGAN | StyleGAN:
    """Return the discriminator of a kind; `filters` and `layers` are the PatchGAN's."""
    if kind == "patchgan":
        return PatchGAN(filters, layers, dtype)
    if kind == "stylegan":
        return StyleGAN(dtype=dtype)
    raise ValueError(f"discriminator {kind!r} is not one of ['patchgan', 'stylegan']")
