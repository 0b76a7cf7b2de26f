"""A language model that reads an image's codes: projector, insertion, loss (arXiv 2412.03069, 3.4).

    codes --visual_features--> (B, N, C) --projector--> (B, N, width) --places--> among the tokens

Rows of tokens come with fixed shapes from `data.chat.insertion`, which documents "ids", "places"
and "segments"; nothing here depends on where images stand, or on how many conversations share a
row, so nothing is compiled again.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.attention import Mask
from tokenflow_jax.nets.layers import exact_gelu
from tokenflow_jax.nets.lm import Cache, Decoder, LMConfig
from tokenflow_jax.nets.resize import area_resize, bicubic_resize
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.tokenizer.pyramid import Scales, features_from_codes
from tokenflow_jax.tokenizer.quantizer import Codebooks

PROJECTORS = ("mlp2x_gelu", "linear")
# What of the codes the language model reads (the paper's table 8).
STRATEGIES = ("last_scale", "last_scale_semantic", "last_scale_pixel", "full_scale", "residual")


def vectors_per_image(scales: Scales, strategy: str) -> int:
    """How many vectors a language model reads of an image."""
    check_strategy(strategy)
    return scales.tokens if strategy in ("full_scale", "residual") else scales.grid**2


def feature_channels(semantic: int, pixel: int, strategy: str) -> int:
    """Channels of these vectors, of a tokenizer with so many semantic and pixel channels."""
    check_strategy(strategy)
    parts = {"last_scale_semantic": semantic, "last_scale_pixel": pixel}
    return parts.get(strategy, semantic + pixel)


def check_strategy(strategy: str) -> None:
    """Raises ValueError unless it is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"input strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")


def visual_features(
    codes_BL: jax.Array, codebooks: Codebooks, scales: Scales, strategy: str = "last_scale"
) -> jax.Array:
    """What a language model reads of images.

    Args:
      codes_BL: all codes of each image.
      codebooks: of the tokenizer.
      scales: its pyramid.
      strategy: "last_scale": the quantised map, all scales resized to the last one and summed, row
        by row. "last_scale_semantic" and "last_scale_pixel": one half of its channels. "residual":
        the vector of every code, coarse to fine. "full_scale": for every code the map that the
        scales up to its own add up to, at its place and in its scale's resolution.

    Returns:
      float32 (B, N, C).
    """
    check_strategy(strategy)
    batch = codes_BL.shape[0]
    if strategy == "residual":
        return codebooks.look_up(codes_BL)
    if strategy == "full_scale":
        return _growing_maps(codes_BL, codebooks, scales)
    maps_BHWC = features_from_codes(codes_BL, codebooks, scales)
    features_BNC = maps_BHWC.reshape(batch, -1, maps_BHWC.shape[-1])
    semantic = codebooks.semantic_KC.shape[-1]
    if strategy == "last_scale_semantic":
        return features_BNC[..., :semantic]
    return features_BNC[..., semantic:] if strategy == "last_scale_pixel" else features_BNC


def _growing_maps(codes_BL: jax.Array, codebooks: Codebooks, scales: Scales) -> jax.Array:
    vectors_BLC, parts, total = codebooks.look_up(codes_BL), [], 0.0
    for side, where in zip(scales.sides, scales.slices(), strict=True):
        own_BhwC = vectors_BLC[:, where].reshape(codes_BL.shape[0], side, side, -1)
        total += bicubic_resize(own_BhwC, scales.grid)
        parts.append(area_resize(total, side).reshape(*vectors_BLC[:, where].shape))
    return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class UnderstandingConfig:
    """Hyper-parameters of the understanding model.

    Attributes:
      lm: of the language model. A mapping of them will do.
      vision_channels: of the vectors of an image.
      projector: "mlp2x_gelu" (linear, exact GELU, linear) or "linear".
      strategy: one of STRATEGIES.
    """

    lm: LMConfig
    vision_channels: int = 40
    projector: str = "mlp2x_gelu"
    strategy: str = "last_scale"

    def __post_init__(self):
        if isinstance(self.lm, Mapping):
            object.__setattr__(self, "lm", LMConfig(**self.lm))
        problems = []
        if self.projector not in PROJECTORS:
            problems.append(f"projector {self.projector!r} is not one of {', '.join(PROJECTORS)}")
        if self.strategy not in STRATEGIES:
            problems.append(f"strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.vision_channels < 1:
            problems.append(f"vision_channels={self.vision_channels} must be positive")
        if problems:
            raise ValueError("understanding model: " + "; ".join(problems))


class Projector(nn.Module):
    """Vectors of an image to the width of the language model.

    Attributes:
      kind: one of PROJECTORS.
      width: of the result.
      dtype: computation dtype.
    """

    kind: str
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        def dense(name: str, x: jax.Array) -> jax.Array:
            # Torch's default, as of the reference: the result is about as large as embeddings are.
            bound = x.shape[-1] ** -0.5
            return nn.Dense(
                self.width,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                bias_init=lambda key, *a: jax.random.uniform(key, *a, minval=-bound, maxval=bound),
                name=name,
            )(x)

        hidden = dense("fc1", features.astype(self.dtype))
        return hidden if self.kind == "linear" else dense("fc2", exact_gelu(hidden))


class Understanding(nn.Module):
    """Projector and language model.

    Attributes:
      config: hyper-parameters.
      dtype: computation dtype; parameters are float32 unless others are passed in.
    """

    config: UnderstandingConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.projector = Projector(cfg.projector, cfg.lm.width, self.dtype)
        self.lm = Decoder(cfg.lm, self.dtype)

    def embed(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
    ) -> jax.Array:
        """The language model's inputs: tokens, images' vectors where they belong, zero at padding.

        Args:
          ids_BL: token ids.
          places_BL: for a vector of an image, its place among the row's M * N; else negative.
          segments_BL: number of the conversation in its row from 1, 0 at padding.
          features_BMNC: float vectors of each row's M images.

        Returns:
          (B, L, width).
        """
        batch, images, vectors, _ = features_BMNC.shape
        projected = on_batch(self.projector(features_BMNC))
        projected_BNC = projected.reshape(batch, images * vectors, self.config.lm.width)
        index_BL1 = jnp.maximum(places_BL, 0)[..., None]
        vectors_BLC = jnp.take_along_axis(projected_BNC, index_BL1, axis=1)
        inputs_BLC = jnp.where(places_BL[..., None] >= 0, vectors_BLC, self.lm.embed(ids_BL))
        return on_batch(jnp.where(segments_BL[..., None] > 0, inputs_BLC, 0))

    def __call__(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the model over whole rows.

        Args:
          ids_BL, places_BL, segments_BL, features_BMNC: see `embed`. No conversation reads another.
          cache: takes keys and values, for answering; rows then begin at its first entry, and each
            is one conversation.

        Returns:
          (B, L, width) after the final norm, and the cache.
        """
        inputs_BLC = self.embed(ids_BL, places_BL, segments_BL, features_BMNC)
        positions_BL = positions_in(segments_BL)
        real_BL = segments_BL > 0
        if cache is None:
            return self.lm(inputs_BLC, positions_BL, Mask(real_BL, segments_BK=segments_BL))
        # What will be written behind these is real; the order hides it until then.
        more = cache.keys.shape[2] - real_BL.shape[1]
        real_BK = jnp.pad(real_BL, ((0, 0), (0, more)), constant_values=True)
        return self.lm(inputs_BLC, positions_BL, Mask(real_BK), cache)

    def loss(
        self,
        ids_BL: jax.Array,
        labels_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
        tokens: int = 4096,
    ) -> dict[str, jax.Array]:
        """Cross entropy of the labels, each predicted one position before its own.

        Args:
          ids_BL, places_BL, segments_BL, features_BMNC: see `embed`; padding is on the right.
          labels_BL: ids that carry loss, negative elsewhere.
          tokens: of which a device holds the logits at once, see `token_losses`.

        Returns:
          float32 scalars: "loss" the sum, "labels" their number, "right" how many were the most
          likely id.
        """
        losses_BL, right_BL, next_BL = self._labelled(
            ids_BL, labels_BL, places_BL, segments_BL, features_BMNC, tokens
        )
        return {
            "loss": losses_BL.sum(),
            "labels": (next_BL >= 0).sum().astype(jnp.float32),
            "right": right_BL.sum().astype(jnp.float32),
        }

    def likelihood(
        self,
        ids_BL: jax.Array,
        labels_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """How likely the labels of each row are; arguments as of `loss`.

        Returns:
          float32 (B,) log probabilities, and bool (B,), whether each label is the most likely id.
        """
        losses_BL, right_BL, next_BL = self._labelled(
            ids_BL, labels_BL, places_BL, segments_BL, features_BMNC, 4096
        )
        return -losses_BL.sum(1), (right_BL | (next_BL < 0)).all(1)

    def _labelled(self, ids_BL, labels_BL, places_BL, segments_BL, features_BMNC, tokens):
        hidden_BLC, _ = self(ids_BL, places_BL, segments_BL, features_BMNC)
        next_BL = jnp.pad(labels_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        losses_BL, right_BL = self.lm.token_losses(hidden_BLC, next_BL, tokens)
        return losses_BL, right_BL, next_BL

    def logits(self, hidden_BLC: jax.Array) -> jax.Array:
        """Scores of the vocabulary, float32 (B, L, V)."""
        return self.lm.logits(hidden_BLC)

    def next_token(
        self, ids_B: jax.Array, positions_B: jax.Array, real_BK: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Logits (B, V) after one more token per row, and the longer cache.

        Args:
          ids_B: the tokens.
          positions_B: theirs.
          real_BK: False at padding, as long as the cache.
          cache: of what came before.
        """
        hidden_B1C, cache = self.lm(
            self.lm.embed(ids_B[:, None]), positions_B[:, None], Mask(real_BK), cache
        )
        return self.lm.logits(hidden_B1C)[:, 0], cache


def positions_in(segments_BL: jax.Array) -> jax.Array:
    """Positions 0, 1, 2, ... that begin anew with every segment, 0 at padding: int32 (B, L)."""
    index_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    firsts_BL = jnp.where(segments_BL != before_BL, index_L, 0)
    return jnp.where(segments_BL > 0, index_L - jax.lax.cummax(firsts_BL, axis=1), 0)


# The language models of the paper's understanding variants, and a small one for real text.
VARIANTS: dict[str, UnderstandingConfig] = {
    "qwen2_5_14b": UnderstandingConfig(
        LMConfig(
            vocabulary_size=152064,
            width=5120,
            layers=48,
            heads=40,
            kv_heads=8,
            mlp_width=13824,
            rope_theta=1e6,
            qkv_bias=True,
        )
    ),
    "vicuna_13b": UnderstandingConfig(
        LMConfig(
            vocabulary_size=32000,
            width=5120,
            layers=40,
            heads=40,
            kv_heads=40,
            mlp_width=13824,
            norm_eps=1e-5,
        )
    ),
    "smollm2": UnderstandingConfig(
        LMConfig(
            vocabulary_size=49152,
            width=576,
            layers=30,
            heads=9,
            kv_heads=3,
            mlp_width=1536,
            rope_theta=1e5,
            norm_eps=1e-5,
            tied_head=True,
        )
    ),
}
