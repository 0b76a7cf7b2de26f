"""The config of the quickstart's teacher; README.md beside this file says what the values do."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Return the config of the shipped weights."""
    config = ml_collections.ConfigDict()

    config.seed = 0  # weights, image order and augmentation
    # Arguments of nets.vit.ViTConfig: 64 tokens from a 64 px image.
    config.vit = {"image_size": 64, "patch_size": 8, "width": 192, "depth": 4, "heads": 6}

    # Image size that Inception sees. k-NN accuracy on CIFAR-10 with 2,400 labeled images at 112 px:
    # Mixed_6e 75 %, Mixed_7a 76 %, the last block 71 %. At 128 px: 80, 81 and 73 %, but 1.4 times
    # slower.
    config.inception_size = 112
    config.components = 128  # principal components of Mixed_6e that the tokens learn
    # Start from whitened patches, sine positions and identity-like attention (init.py).
    config.statistics_start = True

    config.epochs = 3.0  # over CIFAR-10 plus the repeated emoji
    config.emoji_repeats = 8  # times an epoch shows each training emoji
    config.batch_size = 64
    # The first part of the run sees smaller images: fewer tokens, 1.8 times as fast.
    config.small_size = 48
    config.small_fraction = 0.6
    # Arguments of train.optim.OptimizerConfig.
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "final_fraction": 0.01,
        "b1": 0.9,
        "b2": 0.98,
        "epsilon": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
    }
    # Arguments of tools.teacher.train.Distillation: loss weights and augmentation.
    config.loss = {
        "pooled": 2.0,
        "relation": 0.5,
        "spatial": 0.5,
        "temperature": 0.1,
        "shift": 4,
        "color": 0.3,
    }

    config.inception_queries = 2000  # test images on which Inception itself is measured
    config.log_every = 50  # steps between log lines
    config.checkup_every = 400  # steps between k-NN checks on part of CIFAR-10
    return config
