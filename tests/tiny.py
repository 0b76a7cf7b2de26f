"""The smallest tokenizer that has every part; tests vary it with dataclasses.replace."""

from tokenflow_jax.models.tokenizer import TokenizerConfig
from tokenflow_jax.models.vit import ViTConfig

TINY = TokenizerConfig(
    image_size=16,
    scales=(1, 2, 4),
    codebook_size=32,
    semantic_channels=6,
    pixel_channels=3,
    vit=ViTConfig(image_size=16, patch_size=4, width=12, depth=1, heads=2),
    semantic_decoder_depth=1,
    semantic_decoder_heads=2,
    teacher_width=10,
    channels=4,
    multipliers=(1, 1, 2),
    blocks=1,
    latent_channels=8,
    decoder_channels=4,
    decoder_blocks=1,
    norm_groups=2,
)
