"""Rules for the semantic encoders CLIP, SigLIP and ViTamin, and loading one from its own file.

`path` is what our paths start with, "" or ending in "/"; `name` is what the torch names start with,
"" or ending in ".". An encoder of any width and depth may stand alone or inside another checkpoint.
"""

import os
from collections.abc import Mapping
from typing import Any

from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.rules import Rule, RuleTable, flax_arrays, layer, unflatten
from tokenflow_jax.weights.transforms import CONV, CONV1X1_DENSE, DENSE

TOWER = "vision_model."  # before the names of a vision tower in Hugging Face's format


def clip_rules(path: str = "", name: str = "") -> list[Rule]:
    """Return rules for OpenAI's visual transformer, with or without the final projection."""
    block, torch_block = f"{path}blocks", f"{name}transformer.resblocks.{{layer}}"
    return [
        Rule(f"{path}patch_embed/kernel", f"{name}conv1.weight", CONV),
        Rule(f"{path}class_embedding", f"{name}class_embedding"),
        Rule(f"{path}position_embedding", f"{name}positional_embedding"),
        *layer(f"{path}pre_norm", f"{name}ln_pre", norm=True),
        *layer(f"{block}/norm1", f"{torch_block}.ln_1", norm=True),
        Rule(f"{block}/attention/qkv/kernel", f"{torch_block}.attn.in_proj_weight", DENSE),
        Rule(f"{block}/attention/qkv/bias", f"{torch_block}.attn.in_proj_bias"),
        *layer(f"{block}/attention/out", f"{torch_block}.attn.out_proj"),
        *layer(f"{block}/norm2", f"{torch_block}.ln_2", norm=True),
        *layer(f"{block}/mlp/fc1", f"{torch_block}.mlp.c_fc"),
        *layer(f"{block}/mlp/fc2", f"{torch_block}.mlp.c_proj"),
        *layer(f"{path}post_norm", f"{name}ln_post", norm=True),
        Rule(f"{path}projection", f"{name}proj"),
    ]


def _hugging_face_blocks(block: str, torch_block: str) -> list[Rule]:
    """Return rules for a stack of blocks, as Hugging Face names those of CLIP and SigLIP."""
    attention = [f"{torch_block}.self_attn.{part}_proj" for part in "qkv"]
    weights, biases = (tuple(f"{a}.{kind}" for a in attention) for kind in ("weight", "bias"))
    return [
        *layer(f"{block}/norm1", f"{torch_block}.layer_norm1", norm=True),
        Rule(f"{block}/attention/qkv/kernel", weights, DENSE),
        Rule(f"{block}/attention/qkv/bias", biases),
        *layer(f"{block}/attention/out", f"{torch_block}.self_attn.out_proj"),
        *layer(f"{block}/norm2", f"{torch_block}.layer_norm2", norm=True),
        *layer(f"{block}/mlp/fc1", f"{torch_block}.mlp.fc1"),
        *layer(f"{block}/mlp/fc2", f"{torch_block}.mlp.fc2"),
    ]


def siglip_rules(path: str = "", name: str = "") -> list[Rule]:
    """Return rules for SigLIP's vision tower up to any of its layers."""
    return [
        *layer(f"{path}patch_embed", f"{name}embeddings.patch_embedding", CONV),
        Rule(f"{path}position_embedding", f"{name}embeddings.position_embedding.weight"),
        *_hugging_face_blocks(f"{path}blocks", f"{name}encoder.layers.{{layer}}"),
    ]


def siglip_unused_shapes(depth: int, width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    """Return torch names and shapes of what TokenFlow never reads of SigLIP's tower.

    These are the layer after the first `depth`, the final norm and the pooling head; the names
    lack the tower's prefix.
    """
    last = f"encoder.layers.{depth}"
    layers = {f"{last}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    layers["head.attention.out_proj"] = (width, width)
    for mlp in (f"{last}.mlp", "head.mlp"):
        layers |= {f"{mlp}.fc1": (mlp_width, width), f"{mlp}.fc2": (width, mlp_width)}
    for norm in (f"{last}.layer_norm1", f"{last}.layer_norm2", "post_layernorm", "head.layernorm"):
        layers[norm] = (width,)
    shapes: dict[str, tuple[int, ...]] = {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def vitamin_rules(path: str = "", name: str = "") -> list[Rule]:
    """Return rules for ViTamin as timm names it."""
    backbone = f"{name}patch_embed.backbone"
    stage, torch_stage = f"{path}stage_{{i}}_block_{{j}}", f"{backbone}.stages.{{i}}.{{j}}"
    block, torch_block = f"{path}blocks", f"{name}blocks.{{layer}}"
    return [
        *layer(f"{path}stem_conv1", f"{backbone}.stem.conv1", CONV),
        *layer(f"{path}stem_norm", f"{backbone}.stem.norm1", norm=True),
        *layer(f"{path}stem_conv2", f"{backbone}.stem.conv2", CONV),
        *layer(f"{stage}/norm", f"{torch_stage}.pre_norm", norm=True),
        *layer(f"{stage}/widen", f"{torch_stage}.conv1_1x1", CONV1X1_DENSE),
        *layer(f"{stage}/depthwise", f"{torch_stage}.conv2_kxk", CONV),
        *layer(f"{stage}/narrow", f"{torch_stage}.conv3_1x1", CONV1X1_DENSE),
        *layer(f"{stage}/shortcut", f"{torch_stage}.shortcut.expand", CONV1X1_DENSE),
        *layer(f"{path}pool_norm", f"{backbone}.pool.norm", norm=True),
        *layer(f"{path}pool_conv", f"{backbone}.pool.proj", CONV),
        *layer(f"{block}/norm1", f"{torch_block}.norm1", norm=True),
        *layer(f"{block}/attention/qkv", f"{torch_block}.attn.qkv"),
        *layer(f"{block}/attention/out", f"{torch_block}.attn.proj"),
        *layer(f"{block}/norm2", f"{torch_block}.norm2", norm=True),
        *layer(f"{block}/mlp/norm", f"{torch_block}.mlp.norm", norm=True),
        *layer(f"{block}/mlp/gate", f"{torch_block}.mlp.w0"),
        *layer(f"{block}/mlp/value", f"{torch_block}.mlp.w1"),
        *layer(f"{block}/mlp/out", f"{torch_block}.mlp.w2"),
    ]


# A whole model's file also holds a text tower, and a SigLIP's further layers and a head.
CLIP_VISUAL = RuleTable(
    "CLIP visual encoder",
    tuple(clip_rules("", "visual.")),
    ignored=(
        "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight",
        "ln_final.*", "transformer.*", "input_resolution", "context_length", "vocab_size",
    ),
)  # fmt: skip
_CLIP_HUGGING_FACE = RuleTable(
    "CLIP visual encoder (Hugging Face's names)",
    (
        Rule("patch_embed/kernel", f"{TOWER}embeddings.patch_embedding.weight", CONV),
        Rule("class_embedding", f"{TOWER}embeddings.class_embedding"),
        Rule("position_embedding", f"{TOWER}embeddings.position_embedding.weight"),
        *layer("pre_norm", f"{TOWER}pre_layrnorm", norm=True),  # sic
        *_hugging_face_blocks("blocks", f"{TOWER}encoder.layers.{{layer}}"),
        *layer("post_norm", f"{TOWER}post_layernorm", norm=True),
        Rule("projection", "visual_projection.weight", DENSE),
    ),
    ignored=(
        "text_model.*", "text_projection.weight", "logit_scale", f"{TOWER}embeddings.position_ids",
    ),
)  # fmt: skip
_SIGLIP = RuleTable(
    "SigLIP vision tower",
    tuple(siglip_rules("", TOWER)),
    ignored=(
        f"{TOWER}post_layernorm.*", f"{TOWER}head.*", f"{TOWER}encoder.layers.*",
        f"{TOWER}embeddings.position_ids", "text_model.*", "logit_scale", "logit_bias",
    ),
)  # fmt: skip


def _vitamin(name: str) -> RuleTable:
    return RuleTable(
        "ViTamin image encoder",
        tuple(vitamin_rules("", name)),
        ignored=(
            f"{name}head.*", f"{name}norm.*", f"{name}fc_norm.*", "visual.head.*", "text.*",
            "logit_scale", "logit_bias",
        ),
    )  # fmt: skip


def _table(kind: str, names: Mapping[str, Any]) -> RuleTable:
    trunk = "visual.trunk."  # of a whole open_clip model; timm's own files have no prefix
    if kind == "clip":
        hugging_face = any(f".{TOWER}" in f".{name}" for name in names)
        return _CLIP_HUGGING_FACE if hugging_face else CLIP_VISUAL
    if kind == "siglip":
        return _SIGLIP
    if kind == "vitamin":
        return _vitamin(trunk if any(f".{trunk}" in f".{name}" for name in names) else "")
    raise ValueError(f"no files of the encoder {kind!r} are known; one of clip, siglip, vitamin")


def open_encoder(kind: str, path: str | os.PathLike, template: Mapping[str, Any]) -> dict[str, Any]:
    """Open an encoder's weights, of a `kind` of `nets.encoders.ENCODERS`, as nested lazy arrays.

    `path` is OpenAI's ViT-B-16.pt, or a file of open_clip, timm or Hugging Face, sharded or not.
    """
    state = open_state_dict(path)
    return unflatten(flax_arrays(state, _table(kind, state), template))
