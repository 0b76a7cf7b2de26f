"""Training a language model that reads a picture's codes and answers questions about it.

    python -m tokenflow_jax.main --config=configs/understanding.py     minutes on 2 cores, after the
                                                                       tokenizer's quickstart
    python -m tokenflow_jax.main --config=configs/understanding.py:qwen2_5_14b \
        --config.init_from=Qwen2.5-14B-Instruct ...

Variants; `_pretrain` is stage 1, which trains the projector alone on captions, and without it stage
2, which trains projector and language model on instructions, from --config.init_from=PRETRAINED:
    (none)                      a small model from scratch on questions about the emoji
    semantic, pixel             the same, reading one half of the features (the paper's table 8)
    qwen2_5_14b[_pretrain]      TokenFlow-XL with Qwen2.5-14B-Instruct (arXiv 2412.03069, sec. 4.1)
    vicuna_13b[_pretrain]       TokenFlow-B with Vicuna-13B v1.5
    smollm2[_pretrain]          SmolLM2-135M on the emoji; needs its file and text tokenizer
"""

import dataclasses

from ml_collections import ConfigDict

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.understanding.model import VARIANTS, UnderstandingConfig

QUICKSTART = UnderstandingConfig(
    LMConfig(vocabulary_size=259, width=128, layers=2, heads=4, kv_heads=4, mlp_width=384)
)


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant; the docstring of this file lists them."""
    known = {
        "": _quickstart,
        "semantic": lambda: _quickstart("last_scale_semantic"),
        "pixel": lambda: _quickstart("last_scale_pixel"),
        "qwen2_5_14b": lambda: _finetune("qwen2_5_14b"),
        "qwen2_5_14b_pretrain": lambda: _pretrain("qwen2_5_14b"),
        "vicuna_13b": lambda: _vicuna(_finetune("vicuna_13b")),
        "vicuna_13b_pretrain": lambda: _vicuna(_pretrain("vicuna_13b")),
        "smollm2": lambda: _smollm2(_finetune("smollm2")),
        "smollm2_pretrain": lambda: _smollm2(_pretrain("smollm2")),
    }
    if variant not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"variant {variant!r} is unknown; the variants are: {names}")
    return known[variant]()


def _model(model: UnderstandingConfig) -> ConfigDict:
    """Hyper-parameters; the tokenizers decide vision_channels and lm.vocabulary_size where 0."""
    fields = dataclasses.asdict(model) | {"vision_channels": 0}
    for name in ("remat", "attention"):  # config.remat, config.attention
        fields["lm"].pop(name)
    return ConfigDict(fields)


def _base(model: UnderstandingConfig) -> ConfigDict:
    """Return what all variants share."""
    config = ConfigDict()
    config.stage = "understanding"
    config.seed = 0  # of weights and data order
    config.model = _model(model)  # see understanding.model.UnderstandingConfig
    config.dtype = "auto"  # compute in: bfloat16 on accelerators, float32 on CPU
    config.remat = "block"  # what the backward pass recomputes: none, block or dots
    config.attention = "auto"  # its kernel: auto, xla, splash (TPU) or cudnn (GPU)
    config.loss_tokens = 4096  # positions whose logits a device holds at the same time

    config.total_steps = 1000
    config.batch_size = 128  # conversations per step over all devices
    config.accumulate = 1  # microbatches per step, scanned on the device
    # Conversations of a row. With 2 a batch has half as many rows, a long conversation with a short
    # one, and less padding; what is learned is the same. A run may go on with another value.
    config.pack = 1
    config.mesh = ConfigDict()  # devices per axis; -1: the rest
    config.mesh.slice = 1  # slices of a multi-slice job
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = -1  # parameters and optimizer state split, gathered where used
    config.mesh.tensor = 1  # heads, hidden layers and vocabulary split

    # Where weights come from when the workdir has no checkpoint yet: a language model (Hugging Face
    # folder or .gguf), or an understanding model (a workdir, or the released folder).
    config.init_from = ""
    config.trainable = ()  # patterns of parameters that train; () all of them

    config.lora = ConfigDict()  # needs qwix
    config.lora.rank = 0  # of adapters, which train in place of the decoder; 0: none
    config.lora.alpha = 16.0  # adapters are scaled by alpha / rank
    config.lora.modules = ()  # layers with adapters: q, k, v, out, gate, up, down; () all of them
    config.lora.weights = "auto"  # frozen ones: auto (as computed with), float32, int8, int4, nf4

    config.tokenizer = ConfigDict()  # the frozen tokenizer of images
    config.tokenizer.path = ""  # a workdir, a checkpoint of ours, or a PyTorch file
    config.tokenizer.variant = ""  # which model a PyTorch file holds
    # Of its encoders in the step: highest, high, bfloat16; auto is high on TPUs, else highest.
    config.tokenizer.precision = "auto"
    config.tokenizer.fingerprint = ""  # which one it must be; "" any, and filled in
    config.text_tokenizer = ""  # the language model's folder, or bytes

    config.data = ConfigDict()
    config.data.name = "jsonl"  # or parquet, arrow, webdataset, emoji
    config.data.path = ""  # the file or files of conversations
    config.data.eval_path = ""  # another one, of what is held out; "" takes a split of the first
    config.data.image_folder = ""  # where the paths of images begin; the file's folder
    # name=mixture: several sources, a line each: "WEIGHT NAME PATH [key=value ...]".
    config.data.mixture = ()
    config.data.threads = 0  # that read and decode; 0: one per core, at most 32, or 32 if remote
    config.data.allow_outside = False  # read pictures outside the folder, by path or link
    config.data.image_column = ""  # parquet, arrow: column of the pictures; "" finds it
    config.data.split = "train"
    config.data.eval_split = "heldout"
    config.data.questions = ()  # of emoji: kind, name, words, check; () all
    config.data.together = False  # of emoji: all questions about a picture in one conversation
    config.data.template = (
        "qwen_2_5"  # plain, vicuna_v1, llava_v1, llama_2, llava_llama_2, qwen_2_5
    )
    config.data.own_system = False  # conversations begin with data.system, not the template's
    config.data.system = ""
    config.data.image_mode = "pad"  # to a gray square, or square: the aspect ratio changes
    config.data.max_length = 2048  # tokens of a conversation, images included
    config.data.buckets = ()  # lengths of rows below the longest, pack * max_length
    config.data.order = "random"  # or grouped, by kind and length
    config.data.encode = "step"  # make codes of images in the step, or once before training

    config.optimizer = _adam()

    config.log_every = 10  # steps between progress lines
    config.eval_every = 1000  # steps between held-out figures
    config.image_every = 0  # steps between grids; 0 only at the end
    config.checkpoint_every = 500  # steps between checkpoints
    config.keep_checkpoints = 2  # the newest ones
    config.wandb = ConfigDict()
    config.wandb.project = ""  # of Weights & Biases, for curves and grids; "": off
    config.eval = ConfigDict()
    config.eval.batch_size = 32
    config.eval.examples = 500  # held-out conversations per evaluation; 0 all
    config.eval.questions = ()  # of emoji
    config.eval.max_new = 32  # tokens of an answer; 0 answers nothing
    config.eval.grid_images = 8
    return config


def _adam() -> ConfigDict:
    """AdamW with a cosine to zero, as the reference has it."""
    optimizer = ConfigDict()
    optimizer.name = "adamw"  # or adam
    optimizer.learning_rate = 2e-5
    optimizer.schedule = "cosine"  # or constant, linear
    optimizer.warmup_steps = 0
    optimizer.final_fraction = 0.0  # of the learning rate, at the end of a decaying schedule
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.epsilon = 1e-8
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0  # global gradient norm
    return optimizer


def _pretrain(name: str) -> ConfigDict:
    """Stage 1: the projector alone, on 2.5 M pairs of picture and caption."""
    config = _base(VARIANTS[name])
    config.batch_size = 256
    config.total_steps = 2_500_000 // 256
    config.trainable = ("projector",)
    config.remat = "dots"  # on pods; where memory is short, block
    config.data.template = "plain"
    config.data.image_mode = "square"
    config.pack, config.data.buckets = 2, (1536, 1664, 1792, 2048, 2560)  # 729 and a caption, twice
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = round(0.03 * config.total_steps)
    config.tokenizer.variant = "xl"
    return config


def _finetune(name: str) -> ConfigDict:
    """Stage 2: projector and language model, on 10 M instructions."""
    config = _base(VARIANTS[name])
    config.total_steps = 10_000_000 // 128
    config.remat = "dots"  # on pods; where memory is short, block
    config.data.order = "grouped"
    config.pack, config.data.buckets = 2, (1536, 2048, 2304, 2560, 3072)
    config.optimizer.warmup_steps = round(0.03 * config.total_steps)
    config.tokenizer.variant = "xl"
    return config


def _vicuna(config: ConfigDict) -> ConfigDict:
    """TokenFlow-B at 224 px, 14 x 14 vectors, and LLaVA-1.5's data: 558 k pairs, 665 k chats."""
    config.tokenizer.variant = "b"
    if config.data.template == "plain":
        config.total_steps = 558_000 // config.batch_size
        config.data.buckets = (448, 512, 640, 768, 1024)
    else:
        config.total_steps = 665_000 // config.batch_size
        config.data.template = "vicuna_v1"
        config.data.buckets = (768, 1024, 1280, 1536, 2048, 2560)
    config.optimizer.warmup_steps = round(0.03 * config.total_steps)
    return config


def _on_emoji(config: ConfigDict, batch_size: int, steps: int, length: int) -> ConfigDict:
    """Minutes on a small machine: questions about the emoji, the quickstart's tokenizer."""
    config.batch_size, config.total_steps = batch_size, steps
    config.remat = "none"
    config.tokenizer.path = "runs/quickstart"  # of configs/tokenizer.py
    config.tokenizer.variant = ""
    config.data.name = "emoji"
    config.data.encode = "once"
    config.data.image_mode = "square"  # they are square
    config.data.max_length = length
    config.pack, config.data.buckets = 1, ()
    config.data.order = "random"
    config.eval.examples = 0
    config.eval.questions = ("kind",)
    return config


def _smollm2(config: ConfigDict) -> ConfigDict:
    """SmolLM2-135M-Instruct reads the quickstart's codes."""
    pretrain = bool(config.trainable)  # not all of it
    config = _on_emoji(config, 8, 100 if pretrain else 80, 120)
    config.remat = "dots"  # a fifth less memory than none, and no slower
    # Its own chat in both stages: plain rows begin with the picture, and with nothing before that
    # stage 1's loss rises from 8 to 10 first, and rounding decides where it goes from there.
    config.data.template = "qwen_2_5"
    config.data.own_system = True  # none
    config.data.questions = ("kind", "name")
    config.data.together = True
    config.eval.examples = 80
    config.eval.batch_size = 8
    config.eval.max_new = 12
    config.optimizer.learning_rate = 3e-3 if pretrain else 2e-4
    config.optimizer.warmup_steps = 5
    config.log_every, config.eval_every, config.checkpoint_every = 5, 0, 0
    return config


def _quickstart(strategy: str = "last_scale") -> ConfigDict:
    """Half a million parameters that have never seen text read and write bytes."""
    config = _base(dataclasses.replace(QUICKSTART, strategy=strategy))
    config = _on_emoji(config, 32, 400, 160)
    config.data.template = "vicuna_v1"
    config.data.own_system = True  # none: bytes are many
    config.text_tokenizer = "bytes"
    config.data.questions = ("kind", "kind", "name")  # the first counts twice
    config.data.buckets = (128, 160)
    config.eval.max_new = 24
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.log_every, config.eval_every, config.checkpoint_every = 20, 100, 200
    return config
