"""The tokenizer's names in PyTorch checkpoints, and what the converter is handed.

One table covers both decoders (normal and enhanced) and every width and depth: the model's shapes
say which blocks, shortcuts and attentions exist. Only the semantic encoder decides on the table.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.nets.encoders import encoder_kind
from tokenflow_jax.tokenizer.fingerprint import identity
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.weights.names import encoders
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import Rule, RuleTable, layer
from tokenflow_jax.weights.transforms import CONV, CONV1X1_DENSE, DENSE, Transform

_ENCODER = "encoder_vqkd."
_TOWER = _ENCODER + encoders.TOWER
_USAGE = ("quantize.codebook_used", (131072,))  # the reference's history of codes


def _res_block(path: str, name: str) -> list[Rule]:
    return [
        *layer(f"{path}/norm1", f"{name}.norm1", norm=True),
        *layer(f"{path}/conv1", f"{name}.conv1", CONV),
        *layer(f"{path}/norm2", f"{name}.norm2", norm=True),
        *layer(f"{path}/conv2", f"{name}.conv2", CONV),
        *layer(f"{path}/shortcut", f"{name}.nin_shortcut", CONV1X1_DENSE),
    ]


def _attention(path: str, name: str) -> list[Rule]:
    rules = layer(f"{path}/norm", f"{name}.norm", norm=True)
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
        rules += layer(f"{path}/{ours}", f"{name}.{theirs}", CONV1X1_DENSE)
    return rules


def _pixel_branch(path: str, name: str, resample: tuple[str, str]) -> list[Rule]:
    """Return rules for the convolutional encoder or decoder; `resample` is (ours, theirs)."""
    ours, theirs = resample
    return [
        *layer(f"{path}/conv_in", f"{name}.conv_in", CONV),
        *_res_block(f"{path}/level_{{i}}_block_{{j}}", f"{name}.conv_blocks.{{i}}.res.{{j}}"),
        *_attention(f"{path}/level_{{i}}_attn_{{j}}", f"{name}.conv_blocks.{{i}}.attn.{{j}}"),
        *layer(f"{path}/level_{{i}}_{ours}", f"{name}.conv_blocks.{{i}}.{theirs}.conv", CONV),
        *_res_block(f"{path}/mid_block_0", f"{name}.mid.0"),
        *_attention(f"{path}/mid_attn", f"{name}.mid.1"),
        *_res_block(f"{path}/mid_block_1", f"{name}.mid.2"),
        *layer(f"{path}/norm_out", f"{name}.norm_out", norm=True),
        *layer(f"{path}/conv_out", f"{name}.conv_out", CONV),
    ]


def _semantic_decoder(path: str, name: str) -> list[Rule]:
    """Return rules for the BEiT-style decoder, which has biases for q and v only."""
    block, torch_block = f"{path}/blocks", f"{name}.blocks.{{layer}}"
    return [
        *layer(f"{path}/patch_embed", f"{name}.patch_embed.proj", CONV1X1_DENSE),
        Rule(f"{path}/class_embedding", f"{name}.cls_token", Transform(squeeze=(0, 1))),
        Rule(f"{path}/position_embedding", f"{name}.pos_embed", Transform(squeeze=(0,))),
        *layer(f"{block}/norm1", f"{torch_block}.norm1", norm=True),
        Rule(f"{block}/attention/qkv/kernel", f"{torch_block}.attn.qkv.weight", DENSE),
        Rule(f"{block}/attention/q_bias", f"{torch_block}.attn.q_bias"),
        Rule(f"{block}/attention/v_bias", f"{torch_block}.attn.v_bias"),
        *layer(f"{block}/attention/out", f"{torch_block}.attn.proj"),
        *layer(f"{block}/norm2", f"{torch_block}.norm2", norm=True),
        *layer(f"{block}/mlp/fc1", f"{torch_block}.mlp.fc1"),
        *layer(f"{block}/mlp/fc2", f"{torch_block}.mlp.fc2"),
        *layer(f"{path}/post_norm", f"{name}.fc_norm", norm=True),
    ]


@functools.cache
def tokenizer_template(config: TokenizerConfig) -> Mapping[str, Any]:
    """Return the shapes of the tokenizer's parameters, without computing any."""
    return jax.eval_shape(TokenFlow(config).init_params, jax.random.key(0))


@functools.cache
def tokenizer_table(config: TokenizerConfig) -> RuleTable:
    """Return the rules of a tokenizer."""
    kind = config.semantic_encoder
    encoder_rules, name = {
        "clip": (encoders.clip_rules, _ENCODER),
        "siglip": (encoders.siglip_rules, _TOWER),
        "vitamin": (encoders.vitamin_rules, _ENCODER),
    }[kind]
    rules = (
        *encoder_rules("semantic_encoder/", name),
        *layer("semantic_in_1", "encode_task_layer.0"),
        *layer("semantic_in_2", "encode_task_layer.2"),
        *_pixel_branch("pixel_encoder", "encoder", ("down", "downsample")),
        *layer("pixel_in", "quant_conv", CONV1X1_DENSE),
        Rule("semantic_codebook", "quantize.embedding_vqkd.weight"),
        Rule("pixel_codebook", "quantize.embedding_vqgan.weight"),
        *layer("pixel_out", "post_quant_conv", CONV1X1_DENSE),
        *_pixel_branch("pixel_decoder", "decoder", ("up", "upsample")),
        *_semantic_decoder("semantic_decoder", "decoder_vqkd"),
        *layer("semantic_out_1", "decode_task_layer.0"),
        *layer("semantic_out_2", "decode_task_layer.2"),
    )
    # Conversion carries what a checkpoint holds beyond our parameters along, bit for bit.
    buffers = tuple(tokenizer_buffers(config))
    return RuleTable(f"TokenFlow tokenizer with the {kind} encoder", rules, buffers=buffers)


def tokenizer_buffers(config: TokenizerConfig) -> dict[str, np.ndarray]:
    """Return what PyTorch's strict loading needs beyond our parameters, for a model trained here.

    These are an empty usage history, the encoder's normalization and, for the layers of SigLIP that
    nothing reads, zeros.
    """
    name, shape = _USAGE
    buffers = {name: np.zeros(shape, np.float32)}
    kind = encoder_kind(config.semantic_encoder)
    if not kind.raw:
        for name, values in (("shift", kind.mean), ("scale", kind.std)):
            constant = np.array(values, np.float32)[None, :, None, None]
            buffers[f"scaling_layer.{name}"] = constant
    if config.semantic_encoder == "siglip":
        vit = config.vit
        mlp_width = vit.mlp_width or 4 * vit.width
        unused = encoders.siglip_unused_shapes(vit.depth, vit.width, mlp_width)
        buffers |= {_TOWER + name: np.zeros(shape, np.float32) for name, shape in unused.items()}
    return buffers


def _finish(config: TokenizerConfig, arrays: Mapping[str, Any]) -> tuple:
    return config.finished, config.quantizer.finish(arrays, config.pixel_channels)


PART = Part(
    config_class=TokenizerConfig,
    variants=VARIANTS,
    stage="tokenizer",
    table=tokenizer_table,
    template=tokenizer_template,
    finish=_finish,
    buffers=tokenizer_buffers,
    identify=lambda config, arrays: {"tokenizer": identity(config, arrays)},
)
