"""A language model that reads an image's codes: projector, insertion, loss (arXiv 2412.03069, 3.4).

    codes --visual_features--> (B, N, C) --projector--> (B, N, width) --places--> among the tokens

Rows of tokens come with fixed shapes from `data.chat.insertion`, which documents "ids", "places"
and "segments". The program depends neither on where images stand nor on how many conversations
share a row, so nothing recompiles.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.layers import exact_gelu, put_vectors
from tokenflow_jax.nets.lm import Cache, Decoder, LMConfig
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.nets.resize import area_resize, bicubic_resize
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.tokenizer.pyramid import Scales, features_from_codes
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train.by_source import sums_by_source

PROJECTORS = ("mlp2x_gelu", "linear")
# Which code features the language model reads (the paper's table 8).
STRATEGIES = (
    "last_scale",  # the quantized map: all scales resized to the last one and summed, row by row
    "last_scale_semantic",  # one half of its channels
    "last_scale_pixel",  # the other half
    "full_scale",  # for every code the sum of the scales up to its own, in its scale's resolution
    "residual",  # every code's vector, coarse to fine
)


def vectors_per_image(scales: Scales, strategy: str) -> int:
    """Return the number of vectors that the language model reads per image."""
    check_strategy(strategy)
    return scales.tokens if strategy in ("full_scale", "residual") else scales.grid**2


def feature_channels(semantic: int, pixel: int, strategy: str) -> int:
    """Return the channels of these vectors, from the tokenizer's semantic and pixel channels."""
    check_strategy(strategy)
    parts = {"last_scale_semantic": semantic, "last_scale_pixel": pixel}
    return parts.get(strategy, semantic + pixel)


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless the strategy is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"input strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")


def visual_features(
    codes_BL: jax.Array, codebooks: Codebooks, scales: Scales, strategy: str = "last_scale"
) -> jax.Array:
    """Return the features that the language model reads of all codes, float32 (B, N, C)."""
    check_strategy(strategy)
    if strategy in ("residual", "full_scale"):
        vectors_BLC, parts, total = codebooks.look_up(codes_BL), [], 0.0
        if strategy == "residual":
            return vectors_BLC
        for side, where in zip(scales.sides, scales.slices(), strict=True):
            own_BlC = vectors_BLC[:, where]
            total += bicubic_resize(own_BlC.reshape(-1, side, side, own_BlC.shape[-1]), scales.grid)
            parts.append(area_resize(total, side).reshape(own_BlC.shape))
        return jnp.concatenate(parts, axis=1)
    maps_BHWC = features_from_codes(codes_BL, codebooks, scales)
    features_BNC = maps_BHWC.reshape(maps_BHWC.shape[0], -1, maps_BHWC.shape[-1])
    semantic = codebooks.semantic_KC.shape[-1]
    if strategy == "last_scale_semantic":
        return features_BNC[..., :semantic]
    return features_BNC[..., semantic:] if strategy == "last_scale_pixel" else features_BNC


@dataclasses.dataclass(frozen=True)
class UnderstandingConfig:
    """Hyper-parameters of the understanding model."""

    lm: LMConfig  # or a mapping of its fields
    vision_channels: int = 40  # of an image's vectors
    projector: str = "mlp2x_gelu"  # linear, exact GELU, linear; or just "linear"
    strategy: str = "last_scale"  # one of STRATEGIES

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
    """Maps an image's vectors to the width of the language model."""

    kind: str  # one of PROJECTORS
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        def dense(name: str, x: jax.Array) -> jax.Array:
            # Torch's default, like the reference: results are about as large as embeddings.
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
    """Projector and language model."""

    config: UnderstandingConfig
    dtype: jnp.dtype = jnp.float32

    # Methods that run the decoder's linear layers.
    runs_decoder = ("__call__", "loss", "likelihood", "read_on", "next_token")

    def setup(self):
        cfg = self.config
        self.projector = Projector(cfg.projector, cfg.lm.width, self.dtype)
        self.lm = Decoder(cfg.lm, self.dtype)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> dict:
        """Return random weights."""
        ids = jnp.zeros((1, 2), jnp.int32)
        features = jnp.zeros((1, 1, 1, self.config.vision_channels))
        return self.init(key, ids, ids, ids, ids + 1, features, method="loss")["params"]

    def embed(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
    ) -> jax.Array:
        """Return the inputs (B, L, width): tokens, images' vectors in their places, 0 at padding.

        `places_BL` is the index of an image's vector among the row's M * N, negative for a token;
        `segments_BL` the number of the conversation in its row from 1, 0 at padding.
        """
        projected_BMNC = on_batch(self.projector(features_BMNC))
        inputs_BLC = put_vectors(projected_BMNC, places_BL, self.embed_ids(ids_BL))
        return on_batch(jnp.where(segments_BL[..., None] > 0, inputs_BLC, 0))

    def embed_ids(self, ids_BL: jax.Array) -> jax.Array:
        """Return the inputs (B, L, width) of tokens."""
        return self.lm.embed(ids_BL)

    def __call__(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the model over whole rows: (B, L, width) after the final norm, and the cache.

        No conversation reads another; padding is on the right. A cache takes the keys and values,
        for answering: rows then begin at its first entry, each is one conversation, and padding
        may be anywhere.
        """
        inputs_BLC = self.embed(ids_BL, places_BL, segments_BL, features_BMNC)
        positions_BL = positions_in(segments_BL)
        real_BL = segments_BL > 0
        if cache is None:
            # Rows have as many conversations as images. Alone in its row, one never reads the
            # padding on its right.
            shared = jax.tree.leaves(features_BMNC)[0].shape[1] > 1
            mask = Mask(real_BL, segments_BK=segments_BL) if shared else Mask()
        else:
            # Entries to be written later are real; the causal order hides them until then.
            more = cache.keys.shape[2] - real_BL.shape[1]
            mask = Mask(jnp.pad(real_BL, ((0, 0), (0, more)), constant_values=True))
        return self.run(inputs_BLC, positions_BL, mask, places_BL, features_BMNC, cache)

    def run(self, inputs_BLC, index_BL, mask, places_BL, features_BMNC, cache):
        """Run the decoder on rows, in causal order, behind a cache."""
        return self.lm(inputs_BLC, index_BL, mask, cache)

    def loss(
        self,
        ids_BL: jax.Array,
        labels_BL: jax.Array,  # negative where there is no loss
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
        tokens: int = 4096,  # positions whose logits a device holds at a time
        source_BM: jax.Array | None = None,  # of each segment, a place in `sources`
        sources: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Return sums of "loss" (cross entropy), "labels", and "right" ones, which rank first.

        With `source_BM` also "sources", the losses and labels of each.
        """
        losses_BL, right_BL, next_BL = self._token_losses(
            ids_BL, labels_BL, places_BL, segments_BL, features_BMNC, tokens
        )
        sums = {
            "loss": losses_BL.sum(),
            "labels": (next_BL >= 0).sum().astype(jnp.float32),
            "right": right_BL.sum().astype(jnp.float32),
        }
        if source_BM is not None:
            own_BL = jnp.take_along_axis(source_BM, jnp.maximum(segments_BL - 1, 0), axis=1)
            labels_BL = (next_BL >= 0).astype(jnp.float32)
            sums["sources"] = sums_by_source(losses_BL, own_BL, sources, labels_BL)
        return sums

    def likelihood(
        self,
        ids_BL: jax.Array,
        labels_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return log probabilities (B,) of the rows' labels, and bool (B,): all rank first."""
        losses_BL, right_BL, next_BL = self._token_losses(
            ids_BL, labels_BL, places_BL, segments_BL, features_BMNC
        )
        return -losses_BL.sum(1), (right_BL | (next_BL < 0)).all(1)

    def _token_losses(
        self, ids_BL, labels_BL, places_BL, segments_BL, features_BMNC, tokens=4096, **options
    ):
        hidden_BLC, _ = self(ids_BL, places_BL, segments_BL, features_BMNC)
        # Each label is predicted one position before its own.
        next_BL = jnp.pad(labels_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        losses_BL, right_BL = self.lm.token_losses(hidden_BLC, next_BL, tokens, **options)
        return losses_BL, right_BL, next_BL

    def logits(self, hidden_BLC: jax.Array) -> jax.Array:
        return self.lm.logits(hidden_BLC)

    def read_on(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features_BMNC: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Read rows, padded on the right, behind all that the cache has; as `__call__`."""
        inputs_BLC = self.embed(ids_BL, places_BL, segments_BL, features_BMNC)
        index_1L = cache.length + jnp.arange(ids_BL.shape[1])[None]
        return self.run(inputs_BLC, index_1L, Mask(), places_BL, features_BMNC, cache)

    def next_token(
        self, ids_B: jax.Array, positions_B: jax.Array, real_BK: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read one more token per row; return the logits (B, V) that follow, and the cache."""
        hidden_B1C, cache = self.lm(
            self.embed_ids(ids_B[:, None]), positions_B[:, None], Mask(real_BK), cache
        )
        return self.logits(hidden_B1C)[:, 0], cache


def positions_in(segments_BL: jax.Array) -> jax.Array:
    """Return positions 0, 1, 2, ... within each segment, 0 at padding: int32 (B, L)."""
    index_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    firsts_BL = jnp.where(segments_BL != before_BL, index_L, 0)
    return jnp.where(segments_BL > 0, index_L - jax.lax.cummax(firsts_BL, axis=1), 0)


# The language models of the paper's understanding variants, and a small one for real text.
VARIANTS: dict[str, UnderstandingConfig] = {
    "qwen2_5_14b": UnderstandingConfig(LMConfig(
        vocabulary_size=152064, width=5120, layers=48, heads=40, kv_heads=8, mlp_width=13824,
        rope_theta=1e6, qkv_bias=True,
    )),
    "vicuna_13b": UnderstandingConfig(LMConfig(
        vocabulary_size=32000, width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824,
        norm_eps=1e-5,
    )),
    "smollm2": UnderstandingConfig(LMConfig(
        vocabulary_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536,
        rope_theta=1e5, norm_eps=1e-5, tied_head=True,
    )),
}  # fmt: skip
