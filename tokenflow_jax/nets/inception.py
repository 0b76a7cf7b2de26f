"""The FID Inception v3 (2015-12-05 weights): pooled features for FID, and a teacher for small ViTs.

Batch normalization is folded into the convolutions when weights are loaded
(`weights/names/inception.py`), so a layer here is convolution, bias, ReLU. Layer names are those
of the published PyTorch FID file. Two details differ from the torchvision network: average pools
leave the padding out of their count, and the pool branch of the last block takes the maximum.
"""

import re
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

POOL_FEATURES = 2048
MIN_SIZE = 75

# A layer is NAME:CHANNELS:KERNEL (height x width, stride 1, SAME) or NAME:CHANNELS:KERNEL:STRIDE
# (VALID); "+" applies layers to the same input and concatenates them. A block is a tuple of
# branches, each a chain of layers and pools; their outputs are concatenated.
_STEMS = {
    "stem_1": "Conv2d_1a_3x3:32:3x3:2 Conv2d_2a_3x3:32:3x3:1 Conv2d_2b_3x3:64:3x3 down",
    "stem_2": "Conv2d_3b_1x1:80:1x1:1 Conv2d_4a_3x3:192:3x3:1 down",
}


def _block_a(pool: int) -> tuple[str, ...]:
    return (
        "branch1x1:64:1x1",
        "branch5x5_1:48:1x1 branch5x5_2:64:5x5",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3",
        f"average branch_pool:{pool}:1x1",
    )


def _block_c(width: int) -> tuple[str, ...]:
    return (
        "branch1x1:192:1x1",
        f"branch7x7_1:{width}:1x1 branch7x7_2:{width}:1x7 branch7x7_3:192:7x1",
        f"branch7x7dbl_1:{width}:1x1 branch7x7dbl_2:{width}:7x1 branch7x7dbl_3:{width}:1x7 "
        f"branch7x7dbl_4:{width}:7x1 branch7x7dbl_5:192:1x7",
        "average branch_pool:192:1x1",
    )


def _block_e(pool: str) -> tuple[str, ...]:
    return (
        "branch1x1:320:1x1",
        "branch3x3_1:384:1x1 branch3x3_2a:384:1x3+branch3x3_2b:384:3x1",
        "branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 "
        "branch3x3dbl_3a:384:1x3+branch3x3dbl_3b:384:3x1",
        f"{pool} branch_pool:192:1x1",
    )


_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        "branch3x3:384:3x3:2",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3:2",
        "down",
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        "branch3x3_1:192:1x1 branch3x3_2:320:3x3:2",
        "branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3:2",
        "down",
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def layer_names() -> list[str]:
    """Return all 94 convolutions as "Mixed_5b/branch5x5_1", in the network's order."""

    def names(chain: str) -> Iterator[str]:
        return (layer.split(":")[0] for layer in re.split("[ +]", chain) if ":" in layer)

    blocks = _BLOCKS.items()
    inside = [f"{block}/{n}" for block, chains in blocks for chain in chains for n in names(chain)]
    return [name for chain in _STEMS.values() for name in names(chain)] + inside


def _chain(x_BHWC: jax.Array, layers: str) -> jax.Array:
    """Apply a chain of layers inside a parent's compact method."""
    for step in layers.split():
        if step == "average":
            x_BHWC = nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)
        elif step == "maximum":
            x_BHWC = nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME")
        elif step == "down":
            x_BHWC = nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID")
        else:
            parallel = [_layer(*layer.split(":"))(x_BHWC) for layer in step.split("+")]
            x_BHWC = jnp.concatenate([nn.relu(y_BHWC) for y_BHWC in parallel], axis=-1)
    return x_BHWC


def _layer(name: str, channels: str, kernel: str, stride: str = "") -> nn.Conv:
    height, width = kernel.split("x")
    size, padding = (int(height), int(width)), "VALID" if stride else "SAME"
    return nn.Conv(int(channels), size, int(stride or 1), padding, precision="highest", name=name)


class _Block(nn.Module):
    branches: tuple[str, ...]

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return jnp.concatenate([_chain(x_BHWC, branch) for branch in self.branches], axis=-1)


class Inception(nn.Module):
    """Inception v3 up to its pooled features."""

    # Side that images are resized to (bilinear, half-pixel centers, not antialiased). 0 takes
    # images of 75 px or more as they are, since the network is convolutional: far cheaper at small
    # sizes, but FID is defined at 299 px only.
    resize: int = 299
    last: str = "Mixed_7c"  # the block to stop after; later ones cost nothing

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Return the features of images in [-1, 1] by name.

        "pool" is the spatial mean of the last block, (B, 2048) for "Mixed_7c"; the other names are
        those of feature maps (B, h, w, C): "stem_1", "stem_2", "Mixed_5b" ... `last`.
        """
        if self.last not in _BLOCKS:
            raise ValueError(f"last {self.last!r} is no block; one of {list(_BLOCKS)}")
        batch, height, width, channels = images_BHWC.shape
        x = images_BHWC
        if self.resize:
            shape = (batch, self.resize, self.resize, channels)
            x = jax.image.resize(x, shape, "bilinear", antialias=False, precision="highest")
        if min(x.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"images of {height} x {width} pixels: Inception reads {MIN_SIZE} px or more; "
                "set resize"
            )
        maps = {}
        for name, layers in _STEMS.items():
            x = maps[name] = _chain(x, layers)
        for name, branches in _BLOCKS.items():
            x = maps[name] = _Block(branches, name=name)(x)
            if name == self.last:
                break
        return maps | {"pool": x.mean((1, 2))}
