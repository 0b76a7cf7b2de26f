"""Rules for ViTamin as timm names it, alone or inside another checkpoint."""

from tokenflow_jax.weights.names.clip import layer
from tokenflow_jax.weights.rules import CONV, CONV1X1_DENSE, Rule, RuleTable


def vitamin_rules(path: str = "", name: str = "") -> list[Rule]:
    """Rules for the image encoder.

    Args:
      path: what our paths start with, "" or ending in "/".
      name: what the torch names start with, "" or ending in ".".

    Returns:
      Rules for any width and depth.
    """
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


def vitamin_table(name: str = "") -> RuleTable:
    """The table for a file of ViTamin itself.

    Args:
      name: "" for timm's own names, "visual.trunk." for a whole CLIP model of open_clip.
    """
    return RuleTable(
        "ViTamin image encoder",
        tuple(vitamin_rules("", name)),
        ignored=(
            f"{name}head.*",
            f"{name}norm.*",
            f"{name}fc_norm.*",
            "visual.head.*",
            "text.*",
            "logit_scale",
            "logit_bias",
        ),
    )
