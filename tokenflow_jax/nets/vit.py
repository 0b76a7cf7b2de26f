"""Vision transformers: CLIP and SigLIP (semantic encoders and teachers), the semantic decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets import layers
from tokenflow_jax.nets.resize import bicubic_resize


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Hyper-parameters of a vision transformer; the defaults are CLIP ViT-B/16."""

    image_size: int = 224  # side in pixels that the position embeddings are learned for
    patch_size: int = 16  # pixels beyond the last whole patch are not seen
    width: int = 768
    depth: int = 12
    heads: int = 12
    projection: int = 0  # output width of the final projection; 0: none
    epsilon: float = 1e-5
    activation: str = "quick_gelu"  # a key of `layers.ACTIVATIONS`
    mlp_width: int = 0  # 0: four times the width
    class_token: bool = True  # a learned token before the patches
    patch_bias: bool = False
    pre_norm: bool = True  # before the first block
    post_norm: bool = True  # after the last block

    def __post_init__(self):
        problems = []
        if self.image_size < self.patch_size:
            problems.append(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in layers.ACTIVATIONS:
            problems.append(f"activation {self.activation!r}: one of {sorted(layers.ACTIVATIONS)}")
        if problems:
            raise ValueError("vision transformer: " + "; ".join(problems))

    @property
    def grid(self) -> int:
        """Patches along one side of an image of `image_size`."""
        return self.image_size // self.patch_size


# SigLIP SO400M/14 at 384 px up to the hidden state before its last layer, which is what
# TokenFlow-XL reads: 26 of 27 layers and no final norm. Six pixels at the right and bottom edge
# are not seen.
SIGLIP_SO400M = ViTConfig(
    image_size=384,
    patch_size=14,
    width=1152,
    depth=26,
    heads=16,
    epsilon=1e-6,
    activation="gelu_tanh",
    mlp_width=4304,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    post_norm=False,
)


def resize_positions(positions_LD: jax.Array, trained_grid: int, grid: int) -> jax.Array:
    """Resize learned position embeddings to a grid of another side, as the reference does.

    A row before those of the grid is the class token's and is kept.
    """
    if grid == trained_grid:
        return positions_LD
    first_LD, patches = jnp.split(positions_LD, [positions_LD.shape[0] - trained_grid**2])
    patches = patches.reshape(1, trained_grid, trained_grid, -1)
    # The reference calls PyTorch with `scale_factor = (grid + 0.1) / trained_grid`, which samples
    # with exactly that factor; the tenth of a cell shifts the result by far more than rounding.
    resized = bicubic_resize(patches, grid, scale=(grid + 0.1) / trained_grid)
    return jnp.concatenate([first_LD, resized.reshape(grid * grid, -1)])


def _with_positions(
    module: nn.Module, tokens_BND: jax.Array, trained_grid: int, grid: int, class_token: bool = True
) -> jax.Array:
    """Prepend a class token and add positions; the parameters belong to `module`."""
    width = tokens_BND.shape[-1]
    init = nn.initializers.truncated_normal(0.02)
    if class_token:
        class_D = module.param("class_embedding", init, (width,)).astype(tokens_BND.dtype)
        class_B1D = jnp.broadcast_to(class_D, tokens_BND[:, :1].shape)
        tokens_BND = jnp.concatenate([class_B1D, tokens_BND], axis=1)
    positions_LD = module.param("position_embedding", init, (class_token + trained_grid**2, width))
    return tokens_BND + resize_positions(positions_LD, trained_grid, grid).astype(tokens_BND.dtype)


class ViT(nn.Module):
    """The vision transformer of CLIP and SigLIP, returning patch tokens, not a pooled vector."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Encode images as tokens (B, (H // patch)**2, width or projection), row by row.

        The images are (B, H, H, 3), normalized as the weights expect; a grid other than the trained
        one resizes the positions.
        """
        cfg = self.config
        batch, height, width, _ = images_BHWC.shape
        if height != width or (height != cfg.image_size and height % cfg.patch_size):
            raise ValueError(
                f"images of {height} x {width} pixels: the encoder takes square images whose side "
                f"is {cfg.image_size} or a multiple of {cfg.patch_size}"
            )
        grid, patch = height // cfg.patch_size, (cfg.patch_size, cfg.patch_size)
        embed = nn.Conv(
            cfg.width,
            patch,
            patch,
            "VALID",
            use_bias=cfg.patch_bias,
            dtype=self.dtype,
            name="patch_embed",
        )
        tokens_BND = embed(images_BHWC).reshape(batch, grid * grid, cfg.width)
        tokens_BND = _with_positions(self, tokens_BND, cfg.grid, grid, cfg.class_token)
        if cfg.pre_norm:
            tokens_BND = layers.layer_norm(cfg.epsilon, self.dtype, "pre_norm")(tokens_BND)
        tokens_BND = layers.transformer(
            tokens_BND,
            cfg.depth,
            self.remat,
            self.unroll,
            heads=cfg.heads,
            activation=cfg.activation,
            epsilon=cfg.epsilon,
            mlp_width=cfg.mlp_width,
            dtype=self.dtype,
        )[:, int(cfg.class_token) :]
        if cfg.post_norm:
            tokens_BND = layers.layer_norm(cfg.epsilon, self.dtype, "post_norm")(tokens_BND)
        if cfg.projection:
            init = nn.initializers.normal(cfg.width**-0.5)
            projection = self.param("projection", init, (cfg.width, cfg.projection))
            tokens_BND @= projection.astype(self.dtype)
        return tokens_BND


class SemanticDecoder(nn.Module):
    """The ViT that reads the quantized semantic channels: patch 1, BEiT blocks, norm per token."""

    trained_grid: int  # side of the grid that the position embeddings are learned for
    width: int = 768
    depth: int = 3
    heads: int = 12
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, codes_BHWC: jax.Array) -> jax.Array:
        """Map quantized semantic features (B, g, g, C) to tokens (B, g * g, width)."""
        batch, grid, _, channels = codes_BHWC.shape
        tokens_BND = codes_BHWC.reshape(batch, grid * grid, channels)
        tokens_BND = nn.Dense(self.width, dtype=self.dtype, name="patch_embed")(tokens_BND)
        tokens_BND = _with_positions(self, tokens_BND, self.trained_grid, grid)
        tokens_BND = layers.transformer(
            tokens_BND,
            self.depth,
            self.remat,
            self.unroll,
            heads=self.heads,
            qv_bias="qv",
            dtype=self.dtype,
        )
        return layers.layer_norm(1e-6, self.dtype, "post_norm")(tokens_BND[:, 1:])
