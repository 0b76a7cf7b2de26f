"""Training one model that answers questions about pictures and draws pictures.

    python -m tokenflow_jax.main --config=configs/unified.py     minutes on 2 cores, after the
                                                                 tokenizer's quickstart
    python -m tokenflow_jax.main --config=configs/unified.py:7b_pretrain \
        --config.init_from=Qwen2.5-7B-Instruct ...

Variants:
    (none)         a small model from scratch: emoji are named, sorted into kinds, and drawn
    emoji_coarse   the one that ships, the coarse scales of what it draws, 84 minutes on one core
    emoji          all scales, from --config.init_from, four hours
    7b_pretrain    stage 1 of Qwen2.5-7B with a 256-pixel tokenizer: all that a language model lacks
    7b             stage 2, all parameters, from --config.init_from=PRETRAINED
"""

import dataclasses

from ml_collections import ConfigDict

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.unified.model import VARIANTS, UnifiedConfig


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant; the docstring of this file lists them."""
    known = {"": _quickstart, "emoji_coarse": _emoji_coarse, "emoji": _emoji}
    known |= {"7b": _7b, "7b_pretrain": _7b_pretrain}
    if variant not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"variant {variant!r} is unknown; the variants are: {names}")
    return known[variant]()


def _model(model: UnifiedConfig) -> ConfigDict:
    """Return the hyper-parameters; the tokenizers decide those that are empty or 0."""
    fields = dataclasses.asdict(model) | {"vision_channels": 0}
    for name in ("remat", "attention"):  # config.remat, config.attention
        fields["lm"].pop(name)
    return ConfigDict(fields)


def _base(model: UnifiedConfig) -> ConfigDict:
    """Return what all variants share."""
    config = ConfigDict()
    config.stage = "unified"
    config.seed = 0  # of weights, data order and dropped requests
    config.model = _model(model)  # see unified.model.UnifiedConfig
    config.model.rope = "1d"  # positions of scales' inputs, or 3d: by scale, row and column
    config.model.scale_inputs = "accumulated"  # from all coarser scales, or residual: from one
    config.dtype = "auto"  # compute in: bfloat16 on accelerators, float32 on CPU
    config.remat = "block"  # what the backward pass recomputes: none, block or dots
    config.attention = "auto"  # its kernel: auto, xla, splash (TPU) or cudnn (GPU)
    config.loss_tokens = 4096  # positions whose logits a device holds at the same time

    config.total_steps = 100_000
    config.batch_size = 256  # conversations per step over all devices
    config.accumulate = 1  # microbatches per step, scanned on the device
    config.pack = 1  # conversations of a row, a long one with short ones
    config.mesh = ConfigDict()  # devices per axis; -1: the rest
    config.mesh.slice = 1  # slices of a multi-slice job
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = -1  # parameters and optimizer state split, gathered where used
    config.mesh.tensor = 1  # heads, hidden layers and vocabulary split

    # Where weights come from when the workdir has no checkpoint yet: a language model (Hugging Face
    # folder or .gguf), or a run of the stage unified, understanding or generation.
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
    config.text_tokenizer = ""  # the language model's folder, or bytes or words_and_bytes

    config.data = ConfigDict()
    config.data.name = "jsonl"  # or parquet, arrow, webdataset, emoji
    config.data.path = ""  # the file or files of conversations
    config.data.eval_path = ""  # another one, of what is held out; "" takes a split of the first
    config.data.task = "chat"  # conversations; draw: pictures with captions, which ask for them
    config.data.captions = ("{caption}",)  # of task=draw, see data.captions.texts
    config.data.image_folder = ""  # where the paths of images begin; the file's folder
    # name=mixture: several sources, a line each: "WEIGHT NAME PATH [key=value ...]".
    config.data.mixture = ()
    config.data.threads = 0  # that read and decode; 0: one per core, at most 32, or 32 if remote
    config.data.allow_outside = False  # read pictures outside the folder, by path or link
    config.data.image_column = ""  # parquet, arrow: column of the pictures; "" finds it
    config.data.split = "train"
    config.data.eval_split = "heldout"
    # Of emoji: kind, name, words, check, and drawn: draw, draw_tags, cycle, cycle_name. Those
    # listed twice count twice.
    config.data.questions = ()
    config.data.together = False  # of emoji: all questions about a picture in one conversation
    config.data.template = "qwen_2_5"  # or vicuna_v1, llava_v1, llama_2, llava_llama_2
    config.data.own_system = False  # conversations begin with data.system, not the template's
    config.data.system = ""
    config.data.image_mode = "pad"  # to a gray square, or square: the aspect ratio changes
    config.data.max_length = 2048  # tokens of a conversation, images included
    config.data.buckets = ()  # lengths of rows below the longest, pack * max_length
    config.data.order = "random"  # or grouped, by kind and length
    config.data.encode = "step"  # make codes of images in the step, or once before training
    # Coarse scales of drawn pictures that train; 0: all. Rows are shorter: train these first, then
    # all of them from that run (init_from).
    config.data.drawn_scales = 0
    config.data.drop_rate = 0.1  # of requests for a picture that are left out, for guidance

    config.losses = ConfigDict()  # see unified.train.LossConfig
    config.losses.text_weight = 1.0
    config.losses.code_weight = 1.0
    config.losses.vocabulary = "own"  # softmax over text or over codes, or over all ids
    config.losses.scale_power = 0.0  # a code counts side ** -power, for the side of its scale
    config.losses.learn_text_head = True  # False: the head's columns of text stay as they are

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or adam, muon
    config.optimizer.learning_rate = 5e-5
    config.optimizer.schedule = "cosine"  # or constant, linear
    config.optimizer.warmup_steps = 5_000
    config.optimizer.final_fraction = 0.0  # of the learning rate, at the end of a decay
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.decayed = "kernels"  # or all but biases and norms
    config.optimizer.clip_norm = 1.0  # global gradient norm

    config.sampling = ConfigDict()  # defaults of a checkpoint, see generator.Recipe
    config.sampling.guidance = 7.5
    config.sampling.passes = ((600, 0.6),)  # (top_k, top_p) of every pass over a scale
    config.sampling.negative_prompt = ""  # "": nothing is asked for, as in training
    config.sampling.history = True  # a chat draws with what was said, or from the request alone

    config.log_every = 100  # steps between progress lines
    config.eval_every = 5_000  # steps between held-out figures
    config.image_every = 2_500  # steps between grids
    config.checkpoint_every = 2_500  # steps between checkpoints
    config.keep_checkpoints = 3  # the newest ones
    config.wandb = ConfigDict()
    config.wandb.project = ""  # of Weights & Biases, for curves and grids; "": off
    config.eval = ConfigDict()
    config.eval.batch_size = 32
    config.eval.examples = 500  # held-out conversations per evaluation; 0 all
    config.eval.questions = ()  # of emoji
    config.eval.max_new = 32  # tokens of an answer; 0 answers nothing
    config.eval.grid_images = 8
    config.eval.sample_batch = 16  # images drawn at a time
    # Held-out requests drawn at the end, looked up and asked about; 0 leaves it out.
    config.eval.retrieval = 256
    config.eval.prompts = (
        "An elephant walking under the sea.",
        "A castle above the clouds, oil painting.",
        "A red bicycle leaning against a yellow wall.",
        "A portrait of a woman.",
    )
    return config


def _7b() -> ConfigDict:
    """Stage 2: everything, on conversations and captions that `data.mixture` weighs.

    A picture that is drawn is 817 codes, one that is read 256 vectors. Nobody published such a
    recipe: batch and warm-up are those of the generation model, the schedule is that of the
    understanding model, and the learning rate lies between theirs.
    """
    config = _base(VARIANTS["7b"])
    config.remat = "dots"  # on pods; where memory is short, block
    config.tokenizer.variant = "b_256"
    config.pack, config.data.buckets = 2, (1536, 2048, 2304, 2560, 3072)
    return config


def _7b_pretrain() -> ConfigDict:
    """Stage 1: projectors, levels, positions and the codes' columns of the head, on captions."""
    config = _7b()
    config.trainable = (
        "read_projector", "write_projector", "level_embedding", "position_embedding", "lm/head",
    )  # fmt: skip
    config.losses.learn_text_head = False
    config.total_steps = 2_500_000 // 256
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = round(0.03 * config.total_steps)
    return config


QUICKSTART = UnifiedConfig(
    LMConfig(
        vocabulary_size=2**16,  # filled in
        width=128, layers=4, heads=4, kv_heads=4, mlp_width=352, qk_norm=True,
    ),
    scales=(1,),
    codebook_size=1,
    image_start=1,
)  # fmt: skip


def _quickstart() -> ConfigDict:
    """Twenty minutes of CPU time: a small model that has never seen text learns both."""
    config = _base(QUICKSTART)
    config.model.update(scales=(), codebook_size=0, code_channels=0, image_start=0)
    config.model.lm.vocabulary_size = 0
    config.remat = "none"
    config.total_steps, config.batch_size, config.pack = 640, 32, 2
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.tokenizer.path = "runs/quickstart"  # of configs/tokenizer.py
    config.text_tokenizer = "bytes"
    config.data.name = "emoji"
    config.data.encode = "once"
    config.data.image_mode = "square"  # they are square
    config.data.template = "vicuna_v1"
    config.data.own_system = True  # none: bytes are many
    config.data.questions = ("kind", "kind", "name", "draw", "draw", "draw", "cycle")
    config.data.max_length, config.data.buckets = 330, (352, 384, 416, 448, 512)
    config.losses.scale_power = 1.5  # fine scales cannot repair errors of coarse ones
    config.optimizer.name = "muon"  # two to three times faster than AdamW here
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.02
    config.optimizer.b2 = 0.95
    config.sampling.guidance = 1.5
    config.sampling.passes = ((50, 0.7),)
    config.sampling.history = False  # its conversations begin with what is drawn
    config.log_every, config.eval_every, config.image_every = 20, 0, 0
    config.checkpoint_every = 160
    config.eval.examples = 0
    config.eval.questions = ("kind", "draw", "cycle")
    config.eval.max_new = 24
    config.eval.retrieval = 128
    config.eval.prompts = (
        "red apple", "dog face", "blue car", "panda", "pineapple", "rainbow", "blue heart",
        "soccer ball",
    )  # fmt: skip
    return config


# By their names, or by some words of names and tags, so that what people type means something.
_DRAWINGS = (
    "5 emoji task=draw captions={caption}|{caption}|{caption}|{words}|{words}|{tags} as=drawings"
)


def _emoji_coarse() -> ConfigDict:
    """The shipped model's first run: what is drawn is recognizable by its six coarse scales."""
    config = _quickstart()
    config.model.lm.update(width=256, layers=5, heads=4, kv_heads=4, mlp_width=704, tied_head=True)
    config.tokenizer.path = "emoji"
    config.text_tokenizer = "words_and_bytes"
    config.total_steps = 1150
    config.data.name = "mixture"
    config.data.mixture = ("4 emoji questions=kind|kind|name as=answers", _DRAWINGS)
    config.data.drawn_scales = 6
    config.data.max_length, config.data.buckets = 128, (208, 224)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    # What is drawn from a word is one of its emoji; more chance would mix them.
    config.sampling.passes = ((50, 0.2),)
    config.checkpoint_every = 200
    config.eval.retrieval = 158  # once all scales train
    return config


def _emoji() -> ConfigDict:
    """The shipped model's later runs: all scales."""
    config = _emoji_coarse()
    config.total_steps = 1300
    answers = "4 emoji questions=kind|kind|kind|name|cycle|cycle_name as=answers"
    config.data.mixture = (answers, _DRAWINGS)
    config.data.drawn_scales = 0
    config.data.max_length, config.data.buckets = 330, (384, 432, 512)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint_every = 50
    return config
