"""Vision transformers: the CLIP semantic encoder (and teacher), and the semantic decoder.

Position embeddings are learned on one grid. On another grid the reference resizes them bicubically
with `scale_factor = (grid + 0.1) / trained_grid`, and PyTorch then samples with exactly that
factor; the tenth of a cell shifts the result by far more than rounding, so it is reproduced here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.models import layers
from tokenflow_jax.models.resize import bicubic_resize


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Hyper-parameters of a CLIP-style vision transformer.

    Attributes:
      image_size: side in pixels that the position embeddings are learned for.
      patch_size: side of a patch in pixels; must divide image_size.
      width, depth, heads: of the transformer.
      projection: output width of the final projection; 0 leaves tokens after the final norm.
      epsilon: of every LayerNorm.
      activation: a key of `layers.ACTIVATIONS`.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    projection: int = 0
    epsilon: float = 1e-5
    activation: str = "quick_gelu"

    def __post_init__(self):
        problems = []
        if self.image_size % self.patch_size:
            problems.append(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
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


def resize_positions(positions_LD: jax.Array, trained_grid: int, grid: int) -> jax.Array:
    """Resizes learned position embeddings to another grid, as the reference does.

    Args:
      positions_LD: (1 + trained_grid**2, D), the class token's row first.
      trained_grid, grid: cells along one side, before and after.

    Returns:
      (1 + grid**2, D); unchanged when the grids are equal. The class token's row is kept.
    """
    if grid == trained_grid:
        return positions_LD
    patches = positions_LD[1:].reshape(1, trained_grid, trained_grid, -1)
    resized = bicubic_resize(patches, grid, scale=(grid + 0.1) / trained_grid)
    return jnp.concatenate([positions_LD[:1], resized.reshape(grid * grid, -1)])


def transformer(
    x_BLD: jax.Array,
    *,
    depth: int,
    heads: int,
    activation: str,
    epsilon: float,
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
      depth, heads, activation, epsilon, qv_bias, dtype: see `layers.Block`.
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
    x_BLD, _ = scanned(
        heads=heads,
        activation=activation,
        epsilon=epsilon,
        qv_bias=qv_bias,
        dtype=dtype,
        name="blocks",
    )(x_BLD)
    return x_BLD


def _with_class_token(module: nn.Module, tokens_BLD: jax.Array, trained_grid: int, grid: int):
    """Prepends the class token and adds positions; parameters belong to `module`."""
    width = tokens_BLD.shape[-1]
    init = nn.initializers.truncated_normal(0.02)
    class_D = module.param("class_embedding", init, (width,))
    positions_LD = module.param("position_embedding", init, (1 + trained_grid**2, width))
    class_B1D = jnp.broadcast_to(class_D.astype(tokens_BLD.dtype), tokens_BLD[:, :1].shape)
    positions_LD = resize_positions(positions_LD, trained_grid, grid).astype(tokens_BLD.dtype)
    return jnp.concatenate([class_B1D, tokens_BLD], axis=1) + positions_LD


class ViT(nn.Module):
    """CLIP's vision transformer, returning patch tokens instead of a pooled vector.

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
          images_BHWC: (B, H, H, 3), normalised as the weights expect; H a multiple of the patch.
            A grid other than the trained one resizes the position embeddings.

        Returns:
          Patch tokens after the final norm, row by row, (B, (H / patch)**2, width), or that times
          the projection when the configuration has one. The class token is dropped.
        """
        cfg = self.config
        batch, height, width, _ = images_BHWC.shape
        if height != width or height % cfg.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels: the encoder takes square images whose side "
                f"is a multiple of {cfg.patch_size}"
            )
        grid = height // cfg.patch_size
        patch = (cfg.patch_size, cfg.patch_size)
        tokens = nn.Conv(
            cfg.width, patch, patch, "VALID", use_bias=False, dtype=self.dtype, name="patch_embed"
        )(images_BHWC).reshape(batch, grid * grid, cfg.width)
        tokens = _with_class_token(self, tokens, cfg.grid, grid)
        tokens = layers.layer_norm(cfg.epsilon, self.dtype, "pre_norm")(tokens)
        tokens = transformer(
            tokens,
            depth=cfg.depth,
            heads=cfg.heads,
            activation=cfg.activation,
            epsilon=cfg.epsilon,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
        )
        tokens = layers.layer_norm(cfg.epsilon, self.dtype, "post_norm")(tokens[:, 1:])
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
        tokens = _with_class_token(self, tokens, self.trained_grid, grid)
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
