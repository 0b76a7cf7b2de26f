"""Training the model that draws images from text, scale by scale.

    python -m tokenflow_jax.main --config=configs/generation.py       the quickstart's second part
    python -m tokenflow_jax.main --config=configs/generation.py:7b    the paper's recipe

Variants:
    (none)    a small model from scratch on the quickstart tokenizer's codes of the emoji
    7b        LLaMA-2 7B, the paper's recipe (arXiv 2412.03069), with captions dropped for guidance
    parity    the same with all quirks of the released training code
    1b        a model of 1.3 B parameters from scratch, same text and codes
"""

import dataclasses

from ml_collections import ConfigDict

from tokenflow_jax.generation.model import VARIANTS, GenerationConfig
from tokenflow_jax.generation.sample import REFERENCE_NEGATIVE
from tokenflow_jax.nets.lm import LMConfig


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant; the docstring of this file lists them."""
    known = {"": _quickstart, "7b": _7b, "parity": _parity, "1b": _1b}
    if variant not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"variant {variant!r} is unknown; the variants are: {names}")
    return known[variant]()


def _model(model: GenerationConfig) -> ConfigDict:
    """Return the hyper-parameters; the tokenizers decide those that are empty or 0."""
    fields = dataclasses.asdict(model)
    for name in ("remat", "attention"):  # config.remat, config.attention
        fields["lm"].pop(name)
    return ConfigDict(fields)


def _base(model: GenerationConfig) -> ConfigDict:
    """Return what the large variants share: the paper's settings."""
    config = ConfigDict()
    config.stage = "generation"
    config.seed = 0  # of weights, data order and captions
    config.model = _model(model)  # see generation.model.GenerationConfig and nets.lm.LMConfig
    config.model.rope = "1d"  # positions of scales' inputs, or 3d: by scale, row and column
    config.model.scale_inputs = "accumulated"  # from all coarser scales, or residual: from one
    config.dtype = "auto"  # compute in: bfloat16 on accelerators, float32 on CPU
    config.remat = "block"  # what the backward pass recomputes: none, block or dots
    config.attention = "auto"  # its kernel: auto, xla, splash (TPU) or cudnn (GPU)
    config.loss_tokens = 4096  # positions whose logits a device holds at the same time

    config.total_steps = 100_000
    config.batch_size = 256  # captioned images per step over all devices (released: 16 a device)
    config.accumulate = 1  # microbatches per step, scanned on the device
    config.mesh = ConfigDict()  # devices per axis; -1: the rest
    config.mesh.slice = 1  # slices of a multi-slice job
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = -1  # parameters and optimizer state split, gathered where used
    config.mesh.tensor = 1  # heads, hidden layers and vocabulary split

    # Where weights come from when the workdir has no checkpoint yet.
    config.init_from = ""  # a language model (Hugging Face folder), or a generation model
    config.trainable = ()  # patterns of parameters that train; () all of them

    config.lora = ConfigDict()  # needs qwix
    config.lora.rank = 0  # of adapters, which train in place of the decoder; 0: none
    config.lora.alpha = 16.0  # adapters are scaled by alpha / rank
    config.lora.modules = ()  # layers with adapters: q, k, v, out, gate, up, down; () all of them
    config.lora.weights = "auto"  # frozen ones: auto (as computed with), float32, int8, int4, nf4

    config.tokenizer = ConfigDict()  # the frozen image tokenizer
    config.tokenizer.path = ""  # a workdir of stage tokenizer, or a PyTorch file
    config.tokenizer.variant = (
        "b_256_enhanced"  # which model a PyTorch file holds; "" for a workdir
    )
    # Of its encoders in the step: highest, high, bfloat16; auto is high on TPUs, else highest.
    config.tokenizer.precision = "auto"
    config.tokenizer.fingerprint = ""  # which one it must be; "" any, and filled in
    config.text_tokenizer = ""  # LLaMA-2's folder; or bytes, words or words_and_bytes

    config.data = ConfigDict()
    config.data.name = "jsonl"  # webdataset, parquet, arrow, array_record, codes, emoji
    config.data.path = ""  # captions.jsonl, tars, or the folder of a data set
    config.data.image_folder = ""  # jsonl: where the paths of images begin; "" its own folder
    # name=mixture: several sources, a line each: "WEIGHT NAME PATH [key=value ...]".
    config.data.mixture = ()
    config.data.threads = 0  # that read and decode; 0: one per core, at most 32, or 32 if remote
    config.data.allow_outside = False  # read pictures outside the folder, by path or link
    config.data.image_column = ""  # parquet, arrow: column of the pictures; "" finds it
    config.data.min_side = 8  # pixels; smaller pictures are left out
    config.data.max_aspect = 50  # more elongated pictures are left out
    config.data.min_caption = 0  # characters; shorter captions are left out
    config.data.max_caption = 0  # longer captions are left out; 0: none
    config.data.shuffle_block = 0  # neighbours that stay close when shuffled; 0: none do
    config.data.shuffle_window = 16_384  # examples that are mixed at a time, in blocks
    config.data.split = "train"  # what trains
    config.data.eval_split = "heldout"  # what is held out
    config.data.encode = "step"  # make codes of images in the step, or once before training
    config.data.max_length = 128  # ids of a prompt, the start id included; longer ones are cut
    config.data.captions = ("{caption}",)  # see data.captions.texts
    config.data.drop_rate = 0.1  # captions left out, for guidance

    config.losses = ConfigDict()
    config.losses.text_weight = 0.0  # of the caption's own loss
    config.losses.log_text = False  # computes it for the curves
    config.losses.vocabulary = "all"  # softmax over all ids, or over the codes
    config.losses.scale_power = 0.0  # a code counts side ** -power, for the side of its scale

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or adam, muon
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "constant"  # or cosine, linear
    config.optimizer.warmup_steps = 5_000
    config.optimizer.final_fraction = 0.0  # of the learning rate, at the end of a decay
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.decayed = "all"  # but biases and norms; or kernels
    config.optimizer.clip_norm = 0.5  # global gradient norm
    config.ema_decay = 0.0  # moving average of the weights; 0 keeps none

    config.sampling = ConfigDict()  # defaults of a checkpoint, see generator.Recipe
    config.sampling.guidance = 7.5
    config.sampling.passes = ((600, 0.6),)  # (top_k, top_p) of every pass over a scale
    config.sampling.negative_prompt = ""  # "": no caption, as in training

    config.log_every = 100  # steps between progress lines
    config.eval_every = 5_000  # steps between held-out figures
    config.image_every = 2_500  # steps between grids
    config.checkpoint_every = 2_500  # steps between checkpoints
    config.keep_checkpoints = 3  # the newest ones
    config.wandb = ConfigDict()
    config.wandb.project = ""  # of Weights & Biases, for curves and grids; "": off
    config.eval = ConfigDict()
    config.eval.batch_size = 64
    config.eval.examples = 5_000  # held-out images per evaluation; 0 all
    config.eval.sample_batch = 16  # images drawn at a time
    config.eval.retrieval = 256  # captions drawn at the end and looked up; 0 leaves it out
    config.eval.prompts = (
        "An elephant walking under the sea.",
        "A castle above the clouds, oil painting.",
        "A red bicycle leaning against a yellow wall.",
        "A portrait of a woman.",
    )
    return config


def _7b() -> ConfigDict:
    """The paper's model and recipe, with an unconditional branch of its own for guidance."""
    config = _base(VARIANTS["7b"])
    config.remat = "dots"  # on pods; where memory is short, block
    return config


def _parity() -> ConfigDict:
    """As the released code trains: no caption is dropped, the caption's loss is only logged."""
    config = _7b()
    config.data.drop_rate = 0.0
    config.losses.log_text = True
    config.sampling.negative_prompt = REFERENCE_NEGATIVE
    return config


def _1b() -> ConfigDict:
    """A smaller network, from scratch."""
    lm = dataclasses.replace(
        VARIANTS["7b"].lm, width=2048, layers=20, heads=16, kv_heads=16, mlp_width=5504
    )
    config = _base(dataclasses.replace(VARIANTS["7b"], lm=lm))
    config.losses.vocabulary = "codes"
    config.optimizer.schedule = "cosine"
    config.optimizer.b2 = 0.95
    config.ema_decay = 0.9999
    return config


QUICKSTART = GenerationConfig(
    lm=LMConfig(
        vocabulary_size=2**16,  # filled in
        width=128,
        layers=4,
        heads=4,
        kv_heads=4,
        mlp_width=352,
        qk_norm=True,  # but norms before the sublayers: from scratch it learns faster
    ),
    scales=(1,),
    codebook_size=1,
    image_start=1,
)


def _quickstart() -> ConfigDict:
    """Minutes on two cores: a small model memorizes the emoji."""
    config = _base(QUICKSTART)
    config.model.update(scales=(), codebook_size=0, code_channels=0, image_start=0)
    config.model.lm.vocabulary_size = 0
    config.remat = "none"
    config.total_steps = 1_300
    config.batch_size = 16
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.tokenizer.path = "runs/quickstart"  # of configs/tokenizer.py
    config.tokenizer.variant = ""
    config.text_tokenizer = "words"
    config.data.name = "emoji"  # 1,562 captioned pictures inside the package
    config.data.encode = "once"
    config.data.max_length = 12
    config.data.captions = ("{caption}", "{caption}", "{caption}", "{caption}, {tags}")
    config.losses.vocabulary = "codes"
    config.losses.scale_power = 1.5  # fine scales cannot repair errors of coarse ones
    config.optimizer.name = "muon"  # two to three times faster than AdamW here
    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.02
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.sampling.guidance = 1.5
    config.sampling.passes = ((50, 0.7),)
    config.log_every = 50
    config.eval_every = 0
    config.image_every = 650
    config.checkpoint_every = 325
    config.eval.examples = 0
    config.eval.retrieval = 128
    config.eval.prompts = (
        "red apple", "dog face", "blue car", "panda", "pineapple", "rainbow", "blue heart",
        "soccer ball",
    )  # fmt: skip
    return config
