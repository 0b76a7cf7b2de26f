"""One language model that reads pictures and draws them, in any order within a row.

A row is tokens, as in `data.chat.insertion`: text, the vectors of pictures that are read
(`understanding.model`), and the positions of pictures that are written (`generation.model`). For
scales of 1 and 4 codes, 4 vectors, and a picture that is drawn and then read:

    index    0    1   2   3   4    5    6    7    8    9       10  11  12  13   14
    token    draw it  <  img  >                            </img>   (vectors)   end
    place                         -2   -3   -4   -5   -6            0  1  2  3
    input    draw it  <  img  >   f1   f2   f3   f4   zero </img>   v0 v1 v2 v3  end
    level    0    0   0   0   0    2    2    2    2    0       0    0  0  0  0   0
    position                  0    1    2    3    4
    predicts              <  c0   c1   c2   c3   c4  </img>

A picture that was drawn is embedded twice, and differently: what is written sees coarser scales
only, one step ahead of its codes, and never its last scale; its vectors, which follow `</img>`
where anything does, are the finished map, as of any picture that is read.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.nets.layers import put_vectors
from tokenflow_jax.nets.lm import Cache, LMConfig
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.understanding.model import (
    PROJECTORS,
    STRATEGIES,
    Projector,
    Understanding,
)

# What the softmax of a token runs over: its "own" part of the vocabulary, text or codes, which the
# layout always tells; or "all" ids.
VOCABULARIES = ("own", "all")
Features = dict[str, jax.Array]  # "read" (B, M, G, C) and, if pictures are written, "write"


@dataclasses.dataclass(frozen=True)
class UnifiedConfig(GenerationConfig):
    """Hyper-parameters of the unified model."""

    vision_channels: int = 40  # of the vectors that are read
    read_projector: str = "mlp2x_gelu"  # one of `understanding.model.PROJECTORS`
    strategy: str = "last_scale"  # of the vectors, one of `understanding.model.STRATEGIES`

    kind: ClassVar[str] = "unified"

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("read_projector", PROJECTORS), ("strategy", STRATEGIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unified model: {name} {getattr(self, name)!r}: one of {known}")

    @property
    def bounds(self) -> tuple[int, int]:
        """The ids at which codes begin and end."""
        return self.image_start, self.image_start + self.codebook_size

    def ahead(self) -> np.ndarray:
        """Return how many positions after itself each write position may read: int32 (N,)."""
        count = self.pyramid.tokens
        # A position predicts the next code, with its whole scale; the last one `</img>`.
        stops_N = np.concatenate([np.full(s.stop - s.start, s.stop) for s in self.pyramid.slices()])
        ahead_N = np.append(stops_N[1:], count + 1) - 2 - np.arange(count)
        return ahead_N.astype(np.int32)


class Unified(Generation, Understanding):
    """The language model, with a projector for reading and one for writing.

    Arguments of its methods are those of `Understanding`, with two more kinds of place: `-2 - p` is
    code p of the row's M * N; and `features` has "read", (B, M, G, C), of `visual_features`, and
    "write", (B, M, N - 1, C), of `next_scale_features`, which may be missing where no picture is
    written. To a `Sampler` it is a `Generation`.
    """

    config: UnifiedConfig
    dtype: jnp.dtype = jnp.float32

    runs_decoder = ("__call__", "losses", "likelihood", "read_on", "next_token", "decode")
    projector_path = "write_projector"

    def setup(self):
        super().setup()
        cfg = self.config
        self.read_projector = Projector(cfg.read_projector, cfg.lm.width, self.dtype)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> dict:
        """Return random weights."""
        cfg, ids = self.config, jnp.zeros((1, 2), jnp.int32)
        codes = jnp.zeros((1, 1, cfg.pyramid.tokens), jnp.int32)
        features = {
            "read": jnp.zeros((1, 1, 1, cfg.vision_channels)),
            "write": jnp.zeros((1, 1, codes.shape[-1] - 1, cfg.code_channels)),
        }
        return self.init(key, ids, ids, ids, ids + 1, features, codes, method="losses")["params"]

    def embed_ids(self, ids_BL: jax.Array) -> jax.Array:
        # As in a generation model all that is not a scale's features has the first level, read
        # vectors too. It is zero where the weights are a language model's or an understanding
        # model's, for which such a shift of every input would be noise.
        return self.embed_text(ids_BL)

    def embed(
        self, ids_BL: jax.Array, places_BL: jax.Array, segments_BL: jax.Array, features: Features
    ) -> jax.Array:
        """Return the inputs (B, L, width), 0 at padding."""
        zero_C = self.level_embedding[0].astype(self.dtype)
        read_BMGC = on_batch(self.read_projector(features["read"]) + zero_C)
        inputs_BLC = put_vectors(read_BMGC, places_BL, self.embed_ids(ids_BL))
        if "write" in features:
            write_BMNC = self.embed_features(features["write"])
            last_BM1C = jnp.broadcast_to(zero_C, (*write_BMNC.shape[:2], 1, zero_C.shape[-1]))
            write_BMNC = jnp.concatenate([write_BMNC, last_BM1C], axis=2)
            codes_BL = -2 - places_BL
            inputs_BLC = put_vectors(write_BMNC, codes_BL, inputs_BLC)
            next_BL = jnp.pad(codes_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
            opens_BL1 = ((next_BL >= 0) & (next_BL % write_BMNC.shape[2] == 0))[..., None]
            first_C = self.position_embedding[0].astype(self.dtype)
            inputs_BLC += jnp.where(opens_BL1, first_C, 0)
        return on_batch(jnp.where(segments_BL[..., None] > 0, inputs_BLC, 0))

    def __call__(
        self,
        ids_BL: jax.Array,
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features: Features,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the model over whole rows; see `Understanding.__call__`."""
        return Understanding.__call__(self, ids_BL, places_BL, segments_BL, features, cache)

    def run(
        self,
        inputs_BLC: jax.Array,
        index_BL: jax.Array,
        mask: Mask,
        places_BL: jax.Array,
        features: Features,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the decoder on rows in which pictures are written: a scale reads itself whole."""
        if "write" not in features:
            return self.lm(inputs_BLC, index_BL, mask, cache)
        first = 0 if cache is None else cache.length
        index_L = first + jnp.arange(places_BL.shape[1], dtype=jnp.int32)
        codes_BL, ahead_N = -2 - places_BL, self.config.ahead()
        ahead_BL = jnp.asarray(ahead_N)[codes_BL % len(ahead_N)]
        last_BK = index_L + jnp.where(codes_BL >= 0, ahead_BL, 0)
        if cache is not None:
            own_K = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)
            every_BK = jnp.broadcast_to(own_K, (len(places_BL), len(own_K)))
            last_BK = jax.lax.dynamic_update_slice(every_BK, last_BK, (0, first))
        mask = dataclasses.replace(mask, last_BK=last_BK, ahead=int(ahead_N.max()))
        return self.lm(inputs_BLC, self.config.positions(index_BL, codes_BL), mask, cache)

    def logits(self, hidden_BLC: jax.Array) -> jax.Array:
        """Return the scores of text ids, float32 (B, L, image_start)."""
        return self.lm.logits(hidden_BLC, (0, self.config.image_start))

    def losses(
        self,
        ids_BL: jax.Array,
        labels_BL: jax.Array,  # negative where there is no loss, and at write positions
        places_BL: jax.Array,
        segments_BL: jax.Array,
        features: Features,
        codes_BMN: jax.Array,  # of the pictures that are written
        tokens: int = 4096,
        vocabulary: str = "own",  # one of VOCABULARIES
        learned_from: int = 0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the loss of every token, whether its label ranks first, and its label: (B, L).

        A token's label is the next one of its row, negative where there is none. See
        `Decoder.token_losses` for `tokens` and `learned_from`.
        """
        codes_BP = codes_BMN.reshape(len(codes_BMN), -1)
        own_BL = jnp.take_along_axis(codes_BP, jnp.maximum(-2 - places_BL, 0), axis=1)
        labels_BL = jnp.where(places_BL <= -2, self.config.image_start + own_BL, labels_BL)
        bounds = self.config.bounds if vocabulary == "own" else ()
        rows = (ids_BL, labels_BL, places_BL, segments_BL, features, tokens)
        return self._token_losses(*rows, bounds=bounds, learned_from=learned_from)

    def _token_losses(self, *rows: Any, **options: Any):
        return super()._token_losses(*rows, **{"bounds": self.config.bounds, **options})


# Qwen2.5-7B with the 32,768 codes of a 256-pixel tokenizer behind its own rows.
VARIANTS: dict[str, UnifiedConfig] = {
    "7b": UnifiedConfig(
        lm=LMConfig(
            vocabulary_size=184832, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944,
            rope_theta=1e6, qkv_bias=True,
        ),
        scales=(1, 2, 4, 6, 8, 10, 12, 14, 16),
        codebook_size=32768,
        image_start=152064,
    ),
}  # fmt: skip
