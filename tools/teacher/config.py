"""The quickstart's semantic teacher: a 1.8 M parameter ViT distilled from FID Inception features.

See `tools/teacher/train.py` for the method and the command.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the shipped weights."""
    config = ml_collections.ConfigDict()

    config.seed = 0  # weights, order of the pictures and augmentation
    # The student, an argument list of nets.vit.ViTConfig: 64 tokens from pictures of 64 px.
    config.vit = {"image_size": 64, "patch_size": 8, "width": 192, "depth": 4, "heads": 6}

    # Side at which Inception looks at the pictures. k-NN on CIFAR-10 with 2,400 labelled pictures
    # at 112 px: Mixed_6e 75 %, Mixed_7a 76 %, the last block 71 %; at 128 px 80, 81 and 73 %, but
    # 1.4 times slower.
    config.inception_size = 112
    config.components = 128  # principal components of Mixed_6e that tokens learn
    # Whitened patches, sine positions and identity-like attention at the start (teacher_init.py).
    config.statistics_start = True

    config.epochs = 3.0  # over CIFAR-10 plus the repeated emoji
    config.emoji_repeats = 8  # an epoch shows every emoji of the training split this often
    config.batch_size = 64
    # The first part of the steps sees smaller pictures (fewer tokens), 1.8 times as fast.
    config.small_size = 48
    config.small_fraction = 0.6
    # An argument list of optim.OptimizerConfig.
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
    # An argument list of tools.teacher.train.Distillation: weights of the losses, and augmentation.
    config.loss = {
        "pooled": 2.0,
        "relation": 0.5,
        "spatial": 0.5,
        "temperature": 0.1,
        "shift": 4,
        "colour": 0.3,
    }

    config.inception_queries = 2000  # test pictures on which Inception itself is measured
    config.log_every = 50  # steps between lines in the log
    config.checkup_every = 400  # steps between k-NN measurements on a part of CIFAR-10
    return config
