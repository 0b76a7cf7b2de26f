"""Rules for the TokenFlow tokenizer with the CLIP semantic encoder.

The table covers both decoders (normal and enhanced) and every width and depth: which blocks,
shortcuts and attentions exist is read from the model's shapes.
"""

from tokenflow_jax.convert.clip import layer, vit_rules
from tokenflow_jax.convert.rules import CONV, CONV1X1_DENSE, DENSE, Rule, RuleTable, Transform


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
    """Rules for the convolutional encoder or decoder; `resample` is (ours, theirs)."""
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
    """Rules for the BEiT-style decoder: biases for q and v only."""
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


def _tokenizer_rules() -> tuple[Rule, ...]:
    return (
        *vit_rules("semantic_encoder/", "encoder_vqkd."),
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


# The usage history of training is state, not a parameter.
TOKENIZER = RuleTable(
    "TokenFlow tokenizer with the CLIP encoder",
    _tokenizer_rules(),
    buffers=("quantize.codebook_used",),
)
