"""The original PyTorch code of TokenFlow, imported from the user's own checkout.

Its constructors download pretrained networks; here these get random weights instead. Everything
else runs as it is.
"""

import functools
import importlib
import logging
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch


def use(checkout: str) -> None:
    """Make the checkout's packages importable."""
    parts = [Path(checkout) / part for part in ("tokenflow", "i2t", "t2i")]
    if missing := [str(part) for part in parts if not part.is_dir()]:
        raise FileNotFoundError(f"no checkout of the original: {', '.join(missing)} missing")
    sys.path[:0] = map(str, parts)
    _import_torchvision()
    torch.manual_seed(0)
    random.seed(0)


def _import_torchvision() -> None:
    # Its wheels are for CUDA builds of torch. Under a CPU build their operators are missing, which
    # none of the networks here use, and registering them fails.
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            name = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not name:
                raise
            library.define(f"{name[1]}(Tensor x) -> Tensor")
            _LIBRARIES.append(library)
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]


_LIBRARIES = []  # operators live as long as these


def _visual():
    from tokenizer.clip.model import VisionTransformer

    return VisionTransformer(224, 16, 768, 12, 12, 512)


def tokenizer(**options):
    """Build TokenFlow-B."""
    from tokenizer import vq_model

    def load(*args, **kwargs):
        visual = _visual()
        visual.proj = None
        return visual

    vq_model.clip.load_clip_vision = load
    options = {"teacher": "clipb_224", "codebook_size": 32768, **options}
    return vq_model.VQ_models["TokenFlow"](**options)


def losses():
    """Build the losses of the tokenizer's training, discriminator included."""
    from tokenizer import lpips, vq_loss

    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = _visual()

        def encode_image(self, images, **options):
            return self.visual(images, **options)

    vgg = lpips.models.vgg16
    lpips.models.vgg16 = lambda pretrained: vgg(weights=None)
    lpips.LPIPS.load_from_pretrained = lambda self: None
    vq_loss.clip.load = lambda *args, **kwargs: (Teacher(), None)
    return vq_loss.VQLoss(disc_start=0, disc_weight=0.5, image_size=224)


def tokenizer_step(images_BCHW):
    """Return a function that runs one training step of both players."""
    from utils.ema import update_ema

    model, criterion = tokenizer(entropy_loss_ratio=0.05, commit_loss_beta=0.25), losses()
    average = tokenizer()
    update_ema(average, model, decay=0)
    model.train(), criterion.train()
    # A leaf that is written in place; moved to a GPU, it is none any more.
    model.quantize.codebook_used = model.quantize.codebook_used.detach()
    adam = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.9, 0.95))
    players = (model, criterion.discriminator)
    optimizers = [adam(player.parameters()) for player in players]
    logger = logging.getLogger("original")

    def step():
        reconstruction, codebook_loss = model(images_BCHW)
        for index, (player, optimizer) in enumerate(zip(players, optimizers, strict=True)):
            optimizer.zero_grad()
            loss, _ = criterion(
                codebook_loss, images_BCHW, reconstruction, optimizer_idx=index, global_step=1,
                last_layer=model.decoder.last_layer, logger=logger,
            )  # fmt: skip
            loss.backward()
            torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0)
            optimizer.step()
            if not index:
                update_ema(average, model)

    return step


def quantizer_step(codes, features_1CHW):
    """Return a function that finds codes and the gradient of all losses on them."""
    from tokenizer.vq_model import VectorQuantizer

    quantizer = VectorQuantizer(codes, 40, 0.25, 0.1, True, False, [32, 8]).train()
    features_1CHW.requires_grad_()

    def step():
        quantizer.zero_grad()
        _, (vq, commitment, entropy, *_), _ = quantizer(features_1CHW)
        (vq + commitment + entropy).backward()

    return step


def _language_model(package: str, lm, **more):
    module = importlib.import_module(f"{package}.model.language_model.llava_llama")
    config = module.LlavaConfig(
        vocab_size=lm.vocabulary_size, hidden_size=lm.width, num_hidden_layers=lm.layers,
        num_attention_heads=lm.heads, num_key_value_heads=lm.kv_heads,
        intermediate_size=lm.mlp_width, rms_norm_eps=lm.norm_eps, rope_theta=lm.rope_theta,
        max_position_embeddings=4096, mm_hidden_size=40, mm_projector_type="mlp2x_gelu",
        bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa", **more,
    )  # fmt: skip
    builder = importlib.import_module(f"{package}.model.multimodal_projector.builder")
    model = module.LlavaLlamaForCausalLM(config)
    model.model.mm_projector = builder.build_vision_projector(config)
    return model


def understanding(lm):
    """Build the understanding model; its "images" are the tokenizer's features (B, N, C)."""
    model = _language_model("llava", lm)
    model.model.vision_tower = torch.nn.Identity()
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepared(*args, **kwargs):  # newer transformers pass what its `forward` does not take
        inputs = prepare(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    model.prepare_inputs_for_generation = prepared
    return model


def understanding_step(model, ids_BL, labels_BL, features_BNC):
    """Return a function that runs one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step():
        optimizer.zero_grad()
        model(input_ids=ids_BL, labels=labels_BL, images=features_BNC).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def generation(lm, image_start: int, length: int):
    """Build the generation model on top of the enhanced tokenizer."""
    from llava_t2i.model.llava_arch import QKNorm
    from llava_t2i.model.multimodal_encoder import vision_tokenizer

    book = tokenizer(enhanced_decoder=True, infer_interpolate=True).eval()
    model = _language_model("llava_t2i", lm, tokenizer_model_max_length=length)
    tower = vision_tokenizer.VQTower.__new__(vision_tokenizer.VQTower)
    torch.nn.Module.__init__(tower)
    tower.vq_type, tower.vq_model = vision_tokenizer.VQType.TOKEN_FLOW, [book]
    tower.image_size = 256
    # Only codes are compared: decoding has a row of its own.
    tower.decode_to_img_pt = lambda codes: torch.zeros(len(codes), 3, 1, 1)
    inner = model.model
    inner.vision_tower = tower
    inner.lvl_embed = torch.nn.Embedding(len(tower.var_scales) + 1, lm.width)
    inner.pos_1LC = torch.nn.Parameter(0.02 * torch.randn(tower.num_patches, lm.width))
    for layer in inner.layers:
        layer.self_attn.qknorm = QKNorm(dim=lm.width // lm.heads)
    model.image_token_start, model.pad_token_id = image_start, image_start - 1
    model.image_token_end = image_start + 32767
    return SimpleNamespace(model=model.eval(), codebooks=book.quantize)
