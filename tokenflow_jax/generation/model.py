"""Text to image by next-scale prediction (arXiv 2412.03069, sec. 3.3): the model and its losses.

The sequence for scales of 1 and 4 codes, a prefix of P = 6 ids and a suffix of 2:

    index    0    1    2     3    4    5     6    7    8    9    10     11    12
    ids     pad start text  <    img   >     c0   c1   c2   c3   c4     </img> end
    input   pad start text  <    img   >     f1   f2   f3   f4   zero   </img> end
    level    0    0    0    0    0    0      2    2    2    2    0      0     0
    position                          0      1    2    3    4
    predicts                          c0     c1   c2   c3   c4  </img>  end

Codes are never embedded. The input for a scale is what is known before it is predicted: the
features of all coarser scales, resized to it. Each of its positions predicts a code of the same
scale, all of them at once, so attention goes by blocks (`masks.Blocks`): a scale reads itself
whole. The prefix's last id is the block of the first scale.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.layers import exact_gelu
from tokenflow_jax.nets.lm import Cache, Decoder, LMConfig
from tokenflow_jax.nets.masks import Blocks, Mask
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks

_INIT = nn.initializers.normal(0.02)
# Options of NextFlow (arXiv 2601.02204, sec. 2.2) after those of the paper and its released models.
ROPES = ("1d", "3d")
SCALE_INPUTS = ("accumulated", "residual")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Hyper-parameters of the generation model."""

    lm: LMConfig  # or a mapping of its fields; the vocabulary is text, padding and codes
    scales: tuple[int, ...]  # the tokenizer's
    codebook_size: int
    image_start: int  # vocabulary id of code 0; all ids below are text and padding
    code_channels: int = 40  # semantic and pixel
    # Rotary positions of a scale's inputs: in the sequence ("1d"), or by scale, row, column ("3d").
    rope: str = "1d"
    # Made from all coarser scales ("accumulated"), or from the one before alone ("residual").
    scale_inputs: str = "accumulated"

    kind: ClassVar[str] = "generation"

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
            problems.append(f"scales {self.scales} must begin with 1, which one position predicts")
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
        for name, known in (("rope", ROPES), ("scale_inputs", SCALE_INPUTS)):
            if getattr(self, name) not in known:
                problems.append(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if problems:
            raise ValueError(f"{self.kind} model: " + "; ".join(problems))

    @property
    def pyramid(self) -> Scales:
        return Scales(self.scales)

    def blocks(self, prefix: int) -> Blocks:
        """Return the blocks of attention after a prefix of `prefix` ids."""
        return Blocks(prefix - 1, tuple(side * side for side in self.scales))

    def positions(self, index_BL: jax.Array, codes_BL: jax.Array) -> jax.Array:
        """Return the rotary positions of tokens, (B, L) or (B, L, 3), from their sequence's index.

        `codes_BL` numbers the inputs behind `<img>` of a row's pictures, N each; other tokens have
        negative ones. In three axes a scale's input lies behind the last id of `<img>` by its scale
        and by its cell's center, in cells of the finest scale; all else has its index on each axis.
        """
        if self.rope == "1d":
            return index_BL
        behind = [
            (scale, *((at + 0.5) * self.scales[-1] / side for at in divmod(cell, side)))
            for scale, side in enumerate(self.scales[1:], 1)
            for cell in range(side * side)
        ]
        index_N = np.arange(1, self.pyramid.tokens + 1)  # the last one's input is no scale's
        shift_N3 = np.array([*behind, 3 * index_N[-1:].tolist()], np.float32) - index_N[:, None]
        own_BL = jnp.where(codes_BL < 0, -1, codes_BL % len(index_N))
        return index_BL[..., None] + jnp.asarray(shift_N3)[own_BL]


# The published text-to-image model: LLaMA-2-7B, a row for padding, and the 32,768 codes of the
# enhanced 256-pixel tokenizer.
VARIANTS: dict[str, GenerationConfig] = {
    "7b": GenerationConfig(
        lm=LMConfig(
            vocabulary_size=64769, width=4096, layers=32, heads=32, kv_heads=32, mlp_width=11008,
            norm_eps=1e-5, norms="after", qk_norm=True,
        ),
        scales=(1, 2, 4, 6, 8, 10, 12, 14, 16),
        codebook_size=32768,
        image_start=32001,
    ),
}  # fmt: skip


def next_scale_features(
    codes_BN: jax.Array, codebooks: Codebooks, config: GenerationConfig
) -> jax.Array:
    """Return the inputs at all codes but the first, float32 (B, N - 1, C).

    A chain: f = z_1; every further scale's input is up(f), f resized to that scale only, and then
    f = up(f) + z, or f = z if inputs are residual. (The image decoder's input is another: see
    `pyramid.features_from_codes`.)
    """
    scales = config.pyramid
    vectors_BNC = codebooks.look_up(codes_BN)
    batch, _, channels = vectors_BNC.shape
    features_BhwC, inputs = None, [jnp.zeros((batch, 0, channels))]
    for side, where in zip(scales.sides, scales.slices(), strict=True):
        z_BhwC = vectors_BNC[:, where].reshape(batch, side, side, channels)
        if features_BhwC is None:
            features_BhwC = z_BhwC
            continue
        up_BhwC = bicubic_resize(features_BhwC, side)
        features_BhwC = z_BhwC if config.scale_inputs == "residual" else up_BhwC + z_BhwC
        inputs.append(up_BhwC.reshape(batch, -1, channels))
    return jnp.concatenate(inputs, axis=1)


class Projector(nn.Module):
    """Two dense layers with an exact GELU between them: features of codes to tokens."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_BMC: jax.Array) -> jax.Array:
        # Few channels become many: without constraints XLA gathers the whole batch's.
        hidden = on_batch(nn.Dense(self.width, dtype=self.dtype, name="fc1")(features_BMC))
        return on_batch(nn.Dense(self.width, dtype=self.dtype, name="fc2")(exact_gelu(hidden)))


class TokenLosses(NamedTuple):
    """Cross entropies over the whole vocabulary; N codes, T ids of suffix, P of prefix."""

    image: jax.Array  # float32 (B, N + T), of codes and suffix
    image_right: jax.Array  # bool (B, N + T), True where the label scored highest
    text: jax.Array | None = None  # float32 (B, P - 1), of all but the first id, 0 at padding


class Generation(nn.Module):
    """The language model that writes images scale by scale."""

    config: GenerationConfig
    dtype: jnp.dtype = jnp.float32

    runs_decoder = ("__call__", "losses", "decode")  # methods that run its linear layers
    projector_path = "projector"  # among the parameters

    def setup(self):
        cfg = self.config
        self.lm = Decoder(cfg.lm, self.dtype)
        self.projector = Projector(cfg.lm.width, self.dtype, name=self.projector_path)
        # Row 0 is for everything that is not a scale's features. Row 1 would be for the first
        # scale, which has none: it is never used, as in released checkpoints.
        self.level_embedding = self.param(
            "level_embedding", _INIT, (len(cfg.scales) + 1, cfg.lm.width)
        )
        self.position_embedding = self.param(
            "position_embedding", _INIT, (cfg.pyramid.tokens, cfg.lm.width)
        )

    def embed_text(self, ids_BL: jax.Array, first_code_last: bool = False) -> jax.Array:
        """Return the inputs (B, L, C) of a prefix, whose last id predicts a code, or a suffix."""
        x_BLC = self.lm.embed(ids_BL) + self.level_embedding[0].astype(self.dtype)
        if first_code_last:
            x_BLC = x_BLC.at[:, -1].add(self.position_embedding[0].astype(self.dtype))
        return x_BLC

    def embed_features(self, features_BMC: jax.Array, scale: int | None = None) -> jax.Array:
        """Return the inputs (B, M, C) of all scales but the first, or of `scale` (from 0) alone."""
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
        """Run the decoder on whole sequences, as training does: (B, P + N + T, C), after the norm.

        Args:
          prefix_BP: int ids up to and including `<img>`, padded on the left to one length.
          real_BP: bool, False at padding.
          features_BMC: of `next_scale_features`, M = N - 1.
          suffix_BT: int ids of `</img>` and the end.
        """
        batch, prefix = prefix_BP.shape
        inputs_BLC = self.inputs(prefix_BP, features_BMC, suffix_BT)
        length = inputs_BLC.shape[1]
        real_BL = jnp.concatenate([real_BP, jnp.ones((batch, length - prefix), bool)], axis=1)
        mask = Mask(real_BL, self.config.blocks(prefix))
        index_1L, stop = jnp.arange(length)[None], prefix + self.config.pyramid.tokens
        codes_1L = jnp.where(index_1L < stop, index_1L - prefix, -1)
        return self.lm(inputs_BLC, self.config.positions(index_1L, codes_1L), mask)[0]

    def inputs(
        self, prefix_BP: jax.Array, features_BMC: jax.Array, suffix_BT: jax.Array
    ) -> jax.Array:
        """Return the decoder's inputs (B, P + N + T, C); see `__call__`."""
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
        tokens: int = 4096,  # positions whose logits a device holds at a time
    ) -> TokenLosses:
        """Return a batch's losses, with `text` those of the prefix, too."""
        hidden_BLC = self(prefix_BP, real_BP, features_BMC, suffix_BT)
        last = prefix_BP.shape[1] - 1
        labels_BM = jnp.concatenate([self.config.image_start + codes_BN, suffix_BT], axis=1)
        image, right = self.lm.token_losses(hidden_BLC[:, last:-1], labels_BM, tokens)
        if not text:
            return TokenLosses(image, right)
        labels_Bp = jnp.where(real_BP, prefix_BP, -1)[:, 1:]
        text_Bp, _ = self.lm.token_losses(hidden_BLC[:, :last], labels_Bp, tokens)
        return TokenLosses(image, right, text_Bp)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> dict:
        """Return random weights."""
        ids = jnp.zeros((1, 2), jnp.int32)
        codes = jnp.zeros((1, self.config.pyramid.tokens), jnp.int32)
        features = jnp.zeros((1, codes.shape[1] - 1, self.config.code_channels))
        return self.init(key, ids, ids == 0, codes, features, ids, method="losses")["params"]

    def code_logits(self, hidden_BLC: jax.Array) -> jax.Array:
        """Return the scores of codes, float32 (B, L, codebook_size), without computing others."""
        rows = (self.config.image_start, self.config.codebook_size)
        return self.lm.logits(hidden_BLC, rows)

    def decode(
        self,
        inputs_BLC: jax.Array,
        start: jax.Array | int,
        mask: Mask | jax.Array,
        cache: Cache,
        scale: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Run the decoder on inputs, of text or `scale`, from index `start` on, behind a cache.

        With a traced `start` attention reads the whole cache, and with a known one its beginning.
        """
        length = inputs_BLC.shape[1]
        visible = start + length if isinstance(start, int) else 0
        first = -length if scale is None else self.config.pyramid.slices()[scale].start - 1
        index_1L = jnp.arange(length)[None]
        positions = self.config.positions(start + index_1L, first + index_1L)
        return self.lm(inputs_BLC, positions, mask, cache.at(start, visible))
