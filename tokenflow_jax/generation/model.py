"""Text to image by next-scale prediction (arXiv 2412.03069, sec. 3.3): the model and its losses.

A sequence, for scales of 1 and 4 codes, a prefix of P = 6 ids and a suffix of 2:

    index    0    1    2     3    4    5     6    7    8    9    10     11    12
    ids     pad start text  <    img   >     c0   c1   c2   c3   c4     </img> end
    input   pad start text  <    img   >     f1   f2   f3   f4   zero   </img> end
    level    0    0    0    0    0    0      2    2    2    2    0      0     0
    position                          0      1    2    3    4
    predicts                          c0     c1   c2   c3   c4  </img>  end

Codes are never embedded. What stands at the index of a code is what is known when its scale is to
be predicted: the features of all coarser scales, resized to the scale before it is drawn. So every
position predicts a code of its own scale, all codes of a scale at once, and attention within the
scales is by blocks (`attention.Blocks`), beginning with the last id of the prefix.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.attention import Blocks, Mask
from tokenflow_jax.nets.layers import exact_gelu
from tokenflow_jax.nets.lm import Cache, Decoder, LMConfig
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Hyper-parameters of the generation model.

    Attributes:
      lm: of the decoder; its vocabulary is text, padding and codes. A mapping of them will do.
      scales: sides of the code pyramid's grids, ascending, as the tokenizer's.
      codebook_size: number of codes.
      image_start: vocabulary id of code 0; all ids below are text and padding.
      code_channels: channels of a code, semantic and pixel.
    """

    lm: LMConfig
    scales: tuple[int, ...]
    codebook_size: int
    image_start: int
    code_channels: int = 40

    def __post_init__(self):
        if isinstance(self.lm, Mapping):
            object.__setattr__(self, "lm", LMConfig(**self.lm))
        object.__setattr__(self, "scales", tuple(self.scales))
        problems = []
        try:
            self.pyramid  # noqa: B018
        except ValueError as error:
            problems.append(str(error))
        if self.scales[:1] != (1,):
            problems.append(f"scales {self.scales} must begin with 1: one position predicts it")
        if self.image_start < 1 or self.codebook_size < 1:
            problems.append(
                f"image_start={self.image_start} and codebook_size={self.codebook_size} must be "
                "positive"
            )
        if self.image_start + self.codebook_size > self.lm.vocabulary_size:
            problems.append(
                f"lm.vocabulary_size={self.lm.vocabulary_size} does not hold {self.image_start} "
                f"text ids and {self.codebook_size} codes; it must be at least their sum"
            )
        if problems:
            raise ValueError("generation model: " + "; ".join(problems))

    @property
    def pyramid(self) -> Scales:
        """The scales with their arithmetic."""
        return Scales(self.scales)

    def blocks(self, prefix: int) -> Blocks:
        """Where attention is by blocks, after a prefix of so many ids."""
        return Blocks(prefix - 1, tuple(side * side for side in self.scales))


# The published text-to-image model: LLaMA-2-7B with a row for padding and 32,768 codes of the
# enhanced 256-pixel tokenizer.
VARIANTS: dict[str, GenerationConfig] = {
    "7b": GenerationConfig(
        lm=LMConfig(
            vocabulary_size=64769,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=32,
            mlp_width=11008,
            norm_eps=1e-5,
            norms="after",
            qk_norm=True,
        ),
        scales=(1, 2, 4, 6, 8, 10, 12, 14, 16),
        codebook_size=32768,
        image_start=32001,
    ),
}


def scale_inputs(
    codes_BN: jax.Array, codebooks: Codebooks, scales: Scales
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """What each scale but the first is predicted from, and what it becomes with its own codes.

    A chain: f = z_1, then for every further scale the input is up(f), resized to that scale only,
    and f = up(f) + z. (The decoder's input is another one: `multiscale.features_from_codes` resizes
    every scale directly to the finest.)

    Args:
      codes_BN: codes of all scales, or of the coarsest ones.
      codebooks: the tokenizer's.
      scales: of the codes.

    Yields:
      up(f) and up(f) + z, each (B, side, side, C).
    """
    vectors_BNC = codebooks.look_up(codes_BN)
    features_BhwC = None
    for side, where in zip(scales.sides, scales.slices(), strict=True):
        z_BhwC = vectors_BNC[:, where].reshape(codes_BN.shape[0], side, side, -1)
        if features_BhwC is None:
            features_BhwC = z_BhwC
            continue
        up_BhwC = bicubic_resize(features_BhwC, side)
        features_BhwC = up_BhwC + z_BhwC
        yield up_BhwC, features_BhwC


def next_scale_features(codes_BN: jax.Array, codebooks: Codebooks, scales: Scales) -> jax.Array:
    """The inputs at all codes but the first.

    Args:
      codes_BN: int codes, N of them, coarse to fine.
      codebooks, scales: the tokenizer's.

    Returns:
      (B, N - 1, C) float32.
    """
    batch, channels = codes_BN.shape[0], sum(half.shape[-1] for half in codebooks)
    inputs = [
        up.reshape(batch, -1, channels) for up, _ in scale_inputs(codes_BN, codebooks, scales)
    ]
    return jnp.concatenate([jnp.zeros((batch, 0, channels)), *inputs], axis=1)


class Projector(nn.Module):
    """Two dense layers with an exact GELU between them: features of codes to tokens.

    Attributes:
      width: of both layers.
      dtype: computation dtype.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_BMC: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.width, dtype=self.dtype, name="fc1")(features_BMC)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(exact_gelu(hidden))


class TokenLosses(NamedTuple):
    """Cross entropies over the whole vocabulary and whether the label scored highest.

    Attributes:
      image: float32 (B, N + T), of the N codes and the T ids of the suffix.
      image_right: bool, the same shape.
      text: float32 (B, P - 1), of all ids of the prefix but the first, 0 for padding; None unless
        asked for.
      text_labels: bool (B, P - 1), where there is a label.
    """

    image: jax.Array
    image_right: jax.Array
    text: jax.Array | None = None
    text_labels: jax.Array | None = None

    def image_loss(self) -> jax.Array:
        """Mean over codes and suffix of the batch."""
        return self.image.mean()

    def text_loss(self) -> jax.Array:
        """Mean over start, text and `<img>` of the batch."""
        return self.text.sum() / jnp.maximum(self.text_labels.sum(), 1)


class Generation(nn.Module):
    """The language model that writes images scale by scale.

    Attributes:
      config: hyper-parameters.
      dtype: computation dtype; parameters are float32 unless others are passed in.
    """

    config: GenerationConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.lm = Decoder(cfg.lm, self.dtype)
        self.projector = Projector(cfg.lm.width, self.dtype)
        # Row 0 is everything but the features of scales; row 1, of the first scale, which has none,
        # is never used, as in released checkpoints.
        self.level_embedding = self.param(
            "level_embedding", _INIT, (len(cfg.scales) + 1, cfg.lm.width)
        )
        self.position_embedding = self.param(
            "position_embedding", _INIT, (cfg.pyramid.tokens, cfg.lm.width)
        )

    def embed_text(self, ids_BL: jax.Array, first_code_last: bool = False) -> jax.Array:
        """Inputs of ordinary ids.

        Args:
          ids_BL: of the prefix or the suffix.
          first_code_last: for a prefix, whose last position predicts the first code.

        Returns:
          (B, L, C).
        """
        x_BLC = self.lm.embed(ids_BL) + self.level_embedding[0].astype(self.dtype)
        if first_code_last:
            x_BLC = x_BLC.at[:, -1].add(self.position_embedding[0].astype(self.dtype))
        return x_BLC

    def embed_features(self, features_BMC: jax.Array, scale: int | None = None) -> jax.Array:
        """Inputs of codes beyond the first.

        Args:
          features_BMC: of all scales but the first (`next_scale_features`), or of one of them.
          scale: which one, counted from 0; None for all.

        Returns:
          (B, M, C).
        """
        pyramid = self.config.pyramid
        slices = pyramid.slices()
        where = slice(1, pyramid.tokens) if scale is None else slices[scale]
        levels = pyramid.per_token(jnp.arange(len(pyramid)) + 1)[where]
        added = jnp.asarray(self.level_embedding)[levels] + self.position_embedding[where]
        return on_batch(self.projector(features_BMC) + added.astype(self.dtype))

    def __call__(
        self,
        prefix_BP: jax.Array,
        real_BP: jax.Array,
        features_BMC: jax.Array,
        suffix_BT: jax.Array,
    ) -> jax.Array:
        """Runs the decoder on whole sequences, as training does.

        Args:
          prefix_BP: int ids up to and including `<img>`, padded on the left to one length.
          real_BP: bool, False for padding.
          features_BMC: (B, N - 1, C) of `next_scale_features`.
          suffix_BT: int ids of `</img>` and the end.

        Returns:
          (B, P + N + T, C) after the final norm.
        """
        batch, prefix = prefix_BP.shape
        inputs_BLC = self.inputs(prefix_BP, features_BMC, suffix_BT)
        length = inputs_BLC.shape[1]
        real_BL = jnp.concatenate([real_BP, jnp.ones((batch, length - prefix), bool)], axis=1)
        mask = Mask(real_BL, self.config.blocks(prefix))
        hidden_BLC, _ = self.lm(inputs_BLC, jnp.arange(length)[None], mask)
        return hidden_BLC

    def inputs(
        self, prefix_BP: jax.Array, features_BMC: jax.Array, suffix_BT: jax.Array
    ) -> jax.Array:
        """The decoder's inputs (B, P + N + T, C); see `__call__`."""
        zero_C = self.level_embedding[0].astype(self.dtype)
        parts = (
            self.embed_text(prefix_BP, first_code_last=True),
            self.embed_features(features_BMC),
            jnp.broadcast_to(zero_C, (prefix_BP.shape[0], 1, zero_C.shape[-1])),
            self.embed_text(suffix_BT),
        )
        return on_batch(jnp.concatenate(parts, axis=1))

    def losses(
        self,
        prefix_BP: jax.Array,
        real_BP: jax.Array,
        codes_BN: jax.Array,
        features_BMC: jax.Array,
        suffix_BT: jax.Array,
        *,
        text: bool = False,
        tokens: int = 4096,
    ) -> TokenLosses:
        """Losses of a batch; see `__call__`.

        Args:
          prefix_BP, real_BP, features_BMC, suffix_BT: see `__call__`.
          codes_BN: int codes, the labels.
          text: whether to compute the loss of the prefix, too.
          tokens: positions whose logits a device holds at the same time.
        """
        hidden_BLC = self(prefix_BP, real_BP, features_BMC, suffix_BT)
        last = prefix_BP.shape[1] - 1
        labels_BM = jnp.concatenate([self.config.image_start + codes_BN, suffix_BT], axis=1)
        image, right = self.lm.token_losses(hidden_BLC[:, last:-1], labels_BM, tokens)
        if not text:
            return TokenLosses(image, right)
        labels_Bp = jnp.where(real_BP, prefix_BP, -1)[:, 1:]
        text_Bp, _ = self.lm.token_losses(hidden_BLC[:, :last], labels_Bp, tokens)
        return TokenLosses(image, right, text_Bp, real_BP[:, 1:])

    def code_logits(self, hidden_BLC: jax.Array) -> jax.Array:
        """Scores of codes only, float32 (B, L, codebook_size); no other rows are computed."""
        rows = (self.config.image_start, self.config.codebook_size)
        return self.lm.logits(hidden_BLC, rows)

    def decode(
        self, inputs_BLC: jax.Array, start: int, mask: Mask, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder on the tokens from index `start` on.

        Args:
          inputs_BLC: of `embed_text` and `embed_features`.
          start: index of the first of them.
          mask: of all tokens up to the last of them, or more.
          cache: holds the tokens before them; None where there are none.

        Returns:
          (B, L, C) after the final norm, and the cache with these tokens.
        """
        length = inputs_BLC.shape[1]
        positions = start + jnp.arange(length)[None]
        if cache is not None:
            cache = cache.at(start, start + length)
        return self.lm(inputs_BLC, positions, mask, cache)
