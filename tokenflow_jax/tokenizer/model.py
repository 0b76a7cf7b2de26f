"""TokenFlow's image tokenizer: two encoders, one pyramid of shared codes, two decoders.

    images --semantic encoder (ViT)--> 32 channels \\                     / 32 --ViT--> meaning
                                                    >-- quantized map --<
    images --pixel encoder (CNN)------> 8 channels /     (40 channels)   \\  8 --CNN--> images

The meaning is a frozen teacher's patch features of the images.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.cnn import PixelDecoder, PixelEncoder
from tokenflow_jax.nets.encoders import EncoderConfig, encoder_kind, normalize
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.nets.vit import SIGLIP_SO400M, SemanticDecoder, ViTConfig
from tokenflow_jax.nets.vitamin import ViTaminConfig
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.tokenizer.kinds import PAPER, QuantizerConfig
from tokenflow_jax.tokenizer.pyramid import (
    Pyramid,
    Scales,
    features_from_codes,
    residual_quantize,
)
from tokenflow_jax.tokenizer.quantizer import Codebooks

_CLIP_B = ViTConfig()


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Hyper-parameters of the tokenizer; the defaults are TokenFlow-B at 224 px."""

    image_size: int = 224  # side in pixels
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)  # grid sides, ascending to the map's side
    codebook_size: int = 32768  # codes K, shared by both codebooks
    semantic_channels: int = 32  # of a code
    pixel_channels: int = 8  # of a code
    pixel_weight: float = 1.0  # of the pixel distance in the shared mapping (the reference's w_dis)
    semantic_encoder: str = "clip"  # a key of `nets.encoders.ENCODERS`
    vit: EncoderConfig = _CLIP_B  # the semantic encoder, of the class that its kind wants
    semantic_decoder_depth: int = 3
    semantic_decoder_heads: int = 12
    teacher_width: int = 512  # channels of the teacher's features, which the semantic half rebuilds
    channels: int = 128  # of the pixel encoder, times the multiplier of each level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256  # between the quantizer and the pixel encoder or decoder
    decoder_channels: int = 128  # of the pixel decoder (enhanced: 256)
    decoder_blocks: int = 3  # enhanced: 5
    norm_groups: int = 32  # of the pixel branch's GroupNorm
    # Side at which the pixel branch works if not at image_size (TokenFlow-XL: 432): images are
    # resized bicubically on the way in and back on the way out. 0 means image_size.
    pixel_image_size: int = 0
    quantizer: QuantizerConfig = PAPER  # or a mapping of its fields

    def __post_init__(self):
        if not isinstance(self.quantizer, QuantizerConfig):
            object.__setattr__(self, "quantizer", QuantizerConfig(**self.quantizer))
        encoder = encoder_kind(self.semantic_encoder).config
        if not isinstance(self.vit, EncoderConfig):
            object.__setattr__(self, "vit", encoder(**self.vit))
        elif not isinstance(self.vit, encoder):
            raise ValueError(
                f"tokenizer: semantic_encoder {self.semantic_encoder!r} needs a "
                f"{encoder.__name__}, not a {type(self.vit).__name__}"
            )
        object.__setattr__(self, "scales", tuple(self.scales))
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        self._check()

    def _check(self):
        problems = []
        grid = self.pyramid.grid
        # Patches may leave pixels over only at the image size that the encoder was trained for.
        known = self.image_size == self.vit.image_size
        semantic_grid = self.vit.grid if known else self.image_size / self.vit.patch_size
        pixel_image_size = self.pixel_image_size or self.image_size
        pixel_grid = pixel_image_size / 2 ** (len(self.multipliers) - 1)
        if semantic_grid != grid:
            problems.append(
                f"image_size {self.image_size} / patch_size {self.vit.patch_size} gives a semantic "
                f"grid of {semantic_grid:g}, but the scales {self.scales} end at {grid}"
            )
        if pixel_grid != grid:
            problems.append(
                f"pixel_image_size {pixel_image_size} through {len(self.multipliers)} levels gives "
                f"a pixel grid of {pixel_grid:g}, but the scales {self.scales} end at {grid}"
            )
        if self.codebook_size < 2:
            problems.append(f"codebook_size {self.codebook_size} is below 2")
        problems += self.quantizer.problems(
            self.codebook_size, self.semantic_channels, self.pixel_channels
        )
        if self.vit.width % self.semantic_decoder_heads:
            problems.append(
                f"width {self.vit.width} is not a multiple of semantic_decoder_heads "
                f"{self.semantic_decoder_heads}"
            )
        for name in ("channels", "decoder_channels"):
            if any(getattr(self, name) * m % self.norm_groups for m in self.multipliers):
                problems.append(
                    f"{name} {getattr(self, name)} times multipliers {self.multipliers}: every "
                    f"level needs a multiple of norm_groups {self.norm_groups}"
                )
        if problems:
            raise ValueError("tokenizer: " + "; ".join(problems))

    @property
    def pyramid(self) -> Scales:
        return Scales(self.scales)

    @property
    def code_channels(self) -> int:
        return self.semantic_channels + self.pixel_channels

    @property
    def length(self) -> int:
        """Codes of an image."""
        return self.quantizer.heads * self.pyramid.tokens

    @property
    def codes(self) -> int:
        """Number of different codes, which are 0 to that."""
        separate = self.quantizer.mapping == "separate"
        return math.prod(self.index_sizes.values()) if separate else self.codebook_size

    @property
    def index_sizes(self) -> int | dict[str, int]:
        """The number of codes; where codes hold several kinds of indices, that of each."""
        if self.quantizer.heads > 1:
            return {f"head_{h}": self.codebook_size for h in range(self.quantizer.heads)}
        if self.quantizer.mapping != "separate":
            return self.codebook_size
        pixel = self.quantizer.pixel_size(self.codebook_size, self.pixel_channels)
        return {"semantic": self.codebook_size, "pixel": pixel}

    def indices(self, codes: Any) -> Any:
        """Return codes (B, length), or what `index_sizes` names of them, each (B, tokens)."""
        if (heads := self.quantizer.heads) > 1:
            return {f"head_{h}": codes[:, h::heads] for h in range(heads)}
        if self.quantizer.mapping != "separate":
            return codes
        pixel = self.index_sizes["pixel"]
        return {"semantic": codes // pixel, "pixel": codes % pixel}

    @property
    def finished(self) -> "TokenizerConfig":
        """The config of the trained tokenizer, without what is of training only."""
        return dataclasses.replace(self, quantizer=self.quantizer.finished)

    def codebooks(self, params: Mapping[str, jax.Array]) -> Codebooks:
        """Return the codebooks that the tokenizer's parameters stand for."""
        return self.quantizer.codebooks(params, self.pixel_channels)


_SCALES_16 = (1, 2, 4, 6, 8, 10, 12, 14, 16)
_L = TokenizerConfig(
    image_size=256,
    scales=_SCALES_16,
    semantic_encoder="vitamin",
    vit=ViTaminConfig(),
    teacher_width=1152,
)

# The released tokenizers, by the names that configs, checkpoints and the API use. B at 256 px keeps
# the position embeddings of 224 px and resizes them; its enhanced decoder is wider and deeper. The
# paper gives L one scale more than the released code does, and weights fit either.
VARIANTS: dict[str, TokenizerConfig] = {
    "b": TokenizerConfig(),
    "b_256": TokenizerConfig(image_size=256, scales=_SCALES_16),
    "b_256_enhanced": TokenizerConfig(
        image_size=256, scales=_SCALES_16, decoder_channels=256, decoder_blocks=5
    ),
    "l": _L,
    "l_paper": dataclasses.replace(_L, scales=(1, 2, 3, *_SCALES_16[2:])),
    "xl": TokenizerConfig(
        image_size=384,
        scales=(*range(1, 11), 12, 14, 17, 22, 27),
        semantic_encoder="siglip",
        vit=SIGLIP_SO400M,
        teacher_width=1152,
        pixel_image_size=432,
    ),
}


class Reconstruction(NamedTuple):
    images_BHWC: jax.Array  # nominally in [-1, 1], not clamped; float32
    semantic_BND: jax.Array  # reconstruction of the teacher's patch features; float32
    last_hidden_BHWC: jax.Array  # input of the pixel decoder's last convolution


class TokenFlow(nn.Module):
    """The tokenizer: `encode` and `quantize` images, `decode` maps, and codes to `features`."""

    config: TokenizerConfig
    dtype: jnp.dtype = jnp.float32  # of encoders and decoders; the quantizer is always float32
    remat: bool = False  # recompute blocks in the backward pass to save memory

    def setup(self):
        cfg = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        width, common = cfg.vit.width, (self.dtype, self.remat)
        encoder = encoder_kind(cfg.semantic_encoder).module
        self.semantic_encoder = encoder(cfg.vit, *common)
        self.semantic_in_1, self.semantic_in_2 = dense(width), dense(cfg.semantic_channels)
        self.pixel_encoder = PixelEncoder(
            cfg.channels, cfg.multipliers, cfg.blocks, cfg.latent_channels, cfg.norm_groups, *common
        )
        self.pixel_in, self.pixel_out = dense(cfg.pixel_channels), dense(cfg.latent_channels)
        channels = {"semantic": cfg.semantic_channels, "pixel": cfg.pixel_channels}
        tables = cfg.quantizer.parameters(cfg.codebook_size, channels)
        self.tables = {name: self.param(name, *how) for name, how in tables.items()}
        self.semantic_decoder = SemanticDecoder(
            cfg.vit.grid, width, cfg.semantic_decoder_depth, cfg.semantic_decoder_heads, *common
        )
        self.semantic_out_1, self.semantic_out_2 = dense(width), dense(cfg.teacher_width)
        self.pixel_decoder = PixelDecoder(
            cfg.decoder_channels, cfg.multipliers, cfg.decoder_blocks, cfg.norm_groups, *common
        )

    @nn.nowrap
    def init_params(self, key: jax.Array) -> dict:
        """Return random weights."""
        size = self.config.image_size
        return self.init(key, jnp.zeros((1, size, size, 3)))["params"]

    @property
    def codebooks(self) -> Codebooks:
        """The codebooks as they are stored, of any norm."""
        return self.config.codebooks(self.tables)

    def __call__(self, images_BHWC: jax.Array) -> tuple[Pyramid, Reconstruction]:
        """Encode, quantize and decode images (B, H, H, 3) in [-1, 1]."""
        pyramid = self.quantize(self.encode(images_BHWC))
        return pyramid, self.decode(pyramid.quantized_BHWC)

    def encode(self, images_BHWC: jax.Array) -> jax.Array:
        """Encode images (B, H, H, 3) in [-1, 1] as features (B, g, g, C), semantic ones first."""
        cfg = self.config
        size = images_BHWC.shape[1:]
        if size != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(f"images of shape {size}: the tokenizer takes {cfg.image_size} px RGB")
        tokens_BND = self.semantic_tokens(images_BHWC)
        images_BHWC = bicubic_resize(images_BHWC, cfg.pixel_image_size or cfg.image_size)
        images_BHWC = images_BHWC.astype(self.dtype)
        semantic_BNC = self.semantic_in_2(jnp.tanh(self.semantic_in_1(tokens_BND)))
        pixel_BHWC = self.pixel_in(self.pixel_encoder(images_BHWC))
        semantic_BHWC = semantic_BNC.reshape(*pixel_BHWC.shape[:3], cfg.semantic_channels)
        features_BHWC = jnp.concatenate([semantic_BHWC, pixel_BHWC], axis=-1)
        return on_batch(features_BHWC.astype(jnp.float32))

    def semantic_tokens(self, images_BHWC: jax.Array) -> jax.Array:
        """Return the semantic encoder's patch features (B, N, D) of images in [-1, 1]."""
        kind = encoder_kind(self.config.semantic_encoder)
        if not kind.raw:  # CLIP gets images without its own normalization, as in the reference
            images_BHWC = normalize(images_BHWC, kind.mean, kind.std)
        return self.semantic_encoder(images_BHWC.astype(self.dtype))

    def quantize(self, features_BHWC: jax.Array, keep_S: jax.Array | None = None) -> Pyramid:
        """Quantize features to a pyramid of codes; see `residual_quantize`."""
        cfg = self.config
        options = cfg.pyramid, cfg.pixel_weight, keep_S, cfg.quantizer
        return residual_quantize(features_BHWC, self.codebooks, *options)

    def decode(self, quantized_BHWC: jax.Array) -> Reconstruction:
        """Decode a quantized map (B, g, g, C) into images and teacher features."""
        images, hidden = self.decode_pixels(quantized_BHWC)
        return Reconstruction(images, self.decode_semantics(quantized_BHWC), hidden)

    def decode_pixels(self, quantized_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decode the pixel half of a map into images (B, H, H, 3) and the last hidden map."""
        pixel_BHWC = quantized_BHWC[..., self.config.semantic_channels :].astype(self.dtype)
        images_BHWC, hidden_BHWC = self.pixel_decoder(self.pixel_out(pixel_BHWC))
        return self.to_image_size(images_BHWC), hidden_BHWC

    def to_image_size(self, images_BHWC: jax.Array) -> jax.Array:
        """Convert the last convolution's output to float32 at config.image_size."""
        return bicubic_resize(images_BHWC.astype(jnp.float32), self.config.image_size)

    def decode_semantics(self, quantized_BHWC: jax.Array) -> jax.Array:
        """Decode the semantic half of a map into teacher features (B, g * g, teacher_width)."""
        semantic_BHWC = quantized_BHWC[..., : self.config.semantic_channels].astype(self.dtype)
        tokens_BND = jnp.tanh(self.semantic_out_1(self.semantic_decoder(semantic_BHWC)))
        return self.semantic_out_2(tokens_BND).astype(jnp.float32)

    def features(self, codes_BL: jax.Array) -> jax.Array:
        """Return the quantized map (B, g, g, C) of codes, or of their coarsest scales."""
        return features_from_codes(codes_BL, self.codebooks, self.config.pyramid)
