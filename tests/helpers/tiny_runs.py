"""The shipped quickstarts with smaller models, so that the tests follow the config files."""

import dataclasses

from config_files import tokenizer as configs

from tokenflow_jax.nets.vit import ViTConfig

TINY = dataclasses.replace(
    configs.QUICKSTART,
    scales=(2, 4),
    codebook_size=64,
    vit=ViTConfig(image_size=64, patch_size=16, width=16, depth=1, heads=2),
    semantic_decoder_heads=2,
    channels=4,
    multipliers=(1, 1, 1, 1, 2),
    latent_channels=8,
    decoder_channels=4,
    norm_groups=2,
)


def tokenizer_config(**changes):
    """The tokenizer's quickstart with a smaller model and four steps."""
    config = configs.get_config()
    config.model = configs.ConfigDict(dataclasses.asdict(TINY))
    config.teacher.init_encoder = False  # the shipped teacher has another grid
    config.teacher.source = "none"
    config.losses.distillation_weight = 0.0
    config.total_steps, config.batch_size = 4, 4
    config.log_every = config.eval_every = config.image_every = config.checkpoint_every = 2
    config.eval.batch_size, config.eval.examples, config.eval.grid_images = 16, 32, 4
    config.eval.knn_label = ""  # would encode all emoji
    config.optimizer.warmup_steps = 0
    config.update_from_flattened_dict(changes)
    return config
