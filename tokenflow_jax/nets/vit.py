"""Vision transformers: CLIP and SigLIP (semantic encoders and teachers), the semantic decoder.

Position embeddings are learned on one grid. On another grid the reference resizes them bicubically
with `scale_factor = (grid + 0.1) / trained_grid`, and PyTorch then samples with exactly that
factor; the tenth of a cell shifts the result by far more than rounding, so it is reproduced here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets import layers
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.parallel.placement import on_batch


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Hyper-parameters of a vision transformer; the defaults are CLIP ViT-B/16.

    Attributes:
      image_size: side in pixels that the position embeddings are learned for.
      patch_size: side of a patch in pixels; pixels beyond the last whole patch are not seen.
      width, depth, heads: of the transformer.
      projection: output width of the final projection; 0 leaves it out.
      epsilon: of every LayerNorm.
      activation: a key of `layers.ACTIVATIONS`.
      mlp_width: of the hidden layers; 0 takes four times the width.
      class_token: a learned token before the patches.
      patch_bias: the patch embedding has a bias.
      pre_norm, post_norm: a norm before the first and after the last block.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    projection: int = 0
    epsilon: float = 1e-5
    activation: str = "quick_gelu"
    mlp_width: int = 0
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = True

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
    """Resizes learned position embeddings to another grid, as the reference does.

    Args:
      positions_LD: (trained_grid**2, D), or one more with the class token's row first.
      trained_grid, grid: cells along one side, before and after.

    Returns:
      (grid**2, D) or one more; unchanged when the grids are equal. The class token's row is kept.
    """
    if grid == trained_grid:
        return positions_LD
    first_LD, patches = jnp.split(positions_LD, [positions_LD.shape[0] - trained_grid**2])
    patches = patches.reshape(1, trained_grid, trained_grid, -1)
    resized = bicubic_resize(patches, grid, scale=(grid + 0.1) / trained_grid)
    return jnp.concatenate([first_LD, resized.reshape(grid * grid, -1)])


def transformer(
    x_BLD: jax.Array,
    *,
    depth: int,
    heads: int,
    activation: str,
    epsilon: float,
    mlp_width: int = 0,
    gated: bool = False,
    qv_bias: str = "full",
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
) -> jax.Array:
    """Applies `depth` blocks, inside a parent module's compact method, as its child "blocks".

    The blocks are one scanned module: each parameter carries a leading layer axis, and compile time
    does not grow with depth.

    Args:
      x_BLD: tokens.
      depth: number of blocks.
      heads, activation, epsilon, mlp_width, gated, qv_bias, dtype: see `layers.Block`.
      remat: recompute each block's activations in the backward pass.
      unroll: blocks per iteration of the compiled loop; the parameters do not depend on it.

    Returns:
      Tokens (B, L, D).
    """
    block = nn.remat(layers.Block, prevent_cse=False) if remat else layers.Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=depth,
        unroll=unroll,
    )
    x_BLD = on_batch(x_BLD)
    x_BLD, _ = scanned(
        heads=heads,
        activation=activation,
        epsilon=epsilon,
        mlp_width=mlp_width,
        gated=gated,
        qv_bias=qv_bias,
        dtype=dtype,
        name="blocks",
    )(x_BLD)
    return x_BLD


def _with_positions(
    module: nn.Module, tokens_BLD: jax.Array, trained_grid: int, grid: int, class_token: bool = True
) -> jax.Array:
    """Adds positions, after prepending a class token; parameters belong to `module`."""
    width = tokens_BLD.shape[-1]
    init = nn.initializers.truncated_normal(0.02)
    if class_token:
        class_D = module.param("class_embedding", init, (width,)).astype(tokens_BLD.dtype)
        class_B1D = jnp.broadcast_to(class_D, tokens_BLD[:, :1].shape)
        tokens_BLD = jnp.concatenate([class_B1D, tokens_BLD], axis=1)
    positions_LD = module.param("position_embedding", init, (class_token + trained_grid**2, width))
    return tokens_BLD + resize_positions(positions_LD, trained_grid, grid).astype(tokens_BLD.dtype)


class ViT(nn.Module):
    """The vision transformer of CLIP and SigLIP, returning patch tokens, not a pooled vector.

    Attributes:
      config: hyper-parameters.
      dtype: computation dtype; parameters are float32.
      remat, unroll: see `transformer`.
    """

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images_BHWC: (B, H, H, 3), normalised as the weights expect; H the configured size or a
            multiple of the patch. A grid other than the trained one resizes the positions.

        Returns:
          Patch tokens, row by row, (B, (H // patch)**2, width), or that times the projection when
          the configuration has one. The class token is dropped.
        """
        cfg = self.config
        batch, height, width, _ = images_BHWC.shape
        if height != width or (height != cfg.image_size and height % cfg.patch_size):
            raise ValueError(
                f"images of {height} x {width} pixels: the encoder takes square images whose side "
                f"is {cfg.image_size} or a multiple of {cfg.patch_size}"
            )
        grid = height // cfg.patch_size
        patch = (cfg.patch_size, cfg.patch_size)
        tokens = nn.Conv(
            cfg.width,
            patch,
            patch,
            "VALID",
            use_bias=cfg.patch_bias,
            dtype=self.dtype,
            name="patch_embed",
        )(images_BHWC).reshape(batch, grid * grid, cfg.width)
        tokens = _with_positions(self, tokens, cfg.grid, grid, cfg.class_token)
        if cfg.pre_norm:
            tokens = layers.layer_norm(cfg.epsilon, self.dtype, "pre_norm")(tokens)
        tokens = transformer(
            tokens,
            depth=cfg.depth,
            heads=cfg.heads,
            activation=cfg.activation,
            epsilon=cfg.epsilon,
            mlp_width=cfg.mlp_width,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
        )
        tokens = tokens[:, int(cfg.class_token) :]
        if cfg.post_norm:
            tokens = layers.layer_norm(cfg.epsilon, self.dtype, "post_norm")(tokens)
        if cfg.projection:
            init = nn.initializers.normal(cfg.width**-0.5)
            tokens @= self.param("projection", init, (cfg.width, cfg.projection)).astype(self.dtype)
        return tokens


class SemanticDecoder(nn.Module):
    """The ViT that reads the quantised semantic channels: patch 1, BEiT blocks, norm per token.

    Attributes:
      trained_grid: cells along one side that the position embeddings are learned for.
      width, depth, heads: of the transformer.
      dtype, remat, unroll: see `ViT`.
    """

    trained_grid: int
    width: int = 768
    depth: int = 3
    heads: int = 12
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, codes_BHWC: jax.Array) -> jax.Array:
        """Maps quantised semantic features (B, g, g, C) to tokens (B, g * g, width)."""
        batch, grid, _, channels = codes_BHWC.shape
        tokens = codes_BHWC.reshape(batch, grid * grid, channels)
        tokens = nn.Dense(self.width, dtype=self.dtype, name="patch_embed")(tokens)
        tokens = _with_positions(self, tokens, self.trained_grid, grid)
        tokens = transformer(
            tokens,
            depth=self.depth,
            heads=self.heads,
            activation="gelu",
            epsilon=1e-6,
            qv_bias="qv",
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
        )
        return layers.layer_norm(1e-6, self.dtype, "post_norm")(tokens[:, 1:])
