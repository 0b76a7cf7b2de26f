"""The FID Inception v3 (2015-12-05 weights): pooled features for FID, and a teacher for small ViTs.

Batch normalisation is folded into the convolutions when weights are loaded
(`weights/names/inception.py`), so a layer here is convolution, bias, ReLU. Layer names are those
of the published PyTorch FID file. Two details differ from the torchvision network: average pools
leave the padding out of their count, and the pool branch of the last block takes the maximum.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

POOL_FEATURES = 2048
MIN_SIZE = 75

# One line per layer: name, output channels, kernel (h, w), stride, "SAME" or "VALID".
_STEM_1 = (
    ("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    ("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    ("Conv2d_2b_3x3", 64, (3, 3), 1, "SAME"),
)
_STEM_2 = (
    ("Conv2d_3b_1x1", 80, (1, 1), 1, "VALID"),
    ("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
)


def _block_a(pool: int):
    return (
        (("branch1x1", 64, (1, 1)),),
        (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        (
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("average", ("branch_pool", pool, (1, 1))),
    )


def _block_c(width: int):
    return (
        (("branch1x1", 192, (1, 1)),),
        (
            ("branch7x7_1", width, (1, 1)),
            ("branch7x7_2", width, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ),
        (
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", ("branch_pool", 192, (1, 1))),
    )


def _block_e(pool: str):
    # A tuple of layers inside a branch is applied in parallel to the same input and concatenated.
    return (
        (("branch1x1", 320, (1, 1)),),
        (
            ("branch3x3_1", 384, (1, 1)),
            (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
        ),
        (
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, ("branch_pool", 192, (1, 1))),
    )


_DOWN_6A = (
    (("branch3x3", 384, (3, 3), 2, "VALID"),),
    (
        ("branch3x3dbl_1", 64, (1, 1)),
        ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    ),
    ("down",),
)
_DOWN_7A = (
    (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2, "VALID")),
    (
        ("branch7x7x3_1", 192, (1, 1)),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    ),
    ("down",),
)
_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _DOWN_6A,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _DOWN_7A,
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def layer_names() -> list[str]:
    """Names of all 94 convolutions as "Mixed_5b/branch5x5_1", in the network's order."""

    def flat(branch):
        for layer in branch:
            if isinstance(layer, tuple) and isinstance(layer[0], tuple):
                yield from flat(layer)
            elif isinstance(layer, tuple):
                yield layer[0]

    inside = [f"{block}/{n}" for block, spec in _BLOCKS.items() for b in spec for n in flat(b)]
    return [name for name, *_ in _STEM_1 + _STEM_2] + inside


def _layer(name, features, kernel, stride=1, padding="SAME"):
    return nn.Conv(features, kernel, stride, padding, precision="highest", name=name)


def _pool(kind: str, x_BHWC: jax.Array) -> jax.Array:
    if kind == "average":
        return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)
    if kind == "maximum":
        return nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME")
    return nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID")


class _Block(nn.Module):
    """Parallel branches, concatenated over channels; see `_BLOCKS`."""

    branches: tuple

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        outputs = []
        for branch in self.branches:
            y_BHWC = x_BHWC
            for layer in branch:
                if isinstance(layer, str):  # a pool
                    y_BHWC = _pool(layer, y_BHWC)
                elif isinstance(layer[0], tuple):
                    parallel = [nn.relu(_layer(*spec)(y_BHWC)) for spec in layer]
                    y_BHWC = jnp.concatenate(parallel, axis=-1)
                else:
                    y_BHWC = nn.relu(_layer(*layer)(y_BHWC))
            outputs.append(y_BHWC)
        return jnp.concatenate(outputs, axis=-1)


class Inception(nn.Module):
    """Inception v3 up to its pooled features, of any input size from 75 px.

    Without `resize` the network is fully convolutional and reads images as large as they come,
    which is far cheaper at small sizes; FID is defined at 299 px only.

    Attributes:
      resize: side in pixels to which images are resized (bilinear, half-pixel centres, no
        antialiasing); 0 takes them as they are.
      last: the block to stop after; blocks behind it cost nothing.
    """

    resize: int = 299
    last: str = "Mixed_7c"

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Computes features.

        Args:
          images_BHWC: (B, H, W, 3) in [-1, 1]; FID feeds uint8 / 127.5 - 1.

        Returns:
          "pool": (B, C), the spatial mean of the last block, 2048 channels for "Mixed_7c"; also all
          feature maps (B, h, w, C) by name: "stem_1", "stem_2", "Mixed_5b" ... `last`.
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
        for stem, layers in (("stem_1", _STEM_1), ("stem_2", _STEM_2)):
            for layer in layers:
                x = nn.relu(_layer(*layer)(x))
            x = maps[stem] = _pool("down", x)
        for name, branches in _BLOCKS.items():
            x = maps[name] = _Block(branches, name=name)(x)
            if name == self.last:
                break
        return maps | {"pool": x.mean((1, 2))}
