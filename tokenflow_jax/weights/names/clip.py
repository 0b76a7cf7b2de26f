"""Rules for the visual transformer of OpenAI's CLIP, alone or inside another checkpoint."""

from tokenflow_jax.weights.rules import CONV, DENSE, Rule, RuleTable, Transform


def layer(path: str, name: str, kernel: Transform = DENSE, *, norm: bool = False) -> list[Rule]:
    """Rules for a layer's weight and bias; a norm's weight is called scale here."""
    weight = (
        Rule(f"{path}/scale", f"{name}.weight")
        if norm
        else Rule(f"{path}/kernel", f"{name}.weight", kernel)
    )
    return [weight, Rule(f"{path}/bias", f"{name}.bias")]


def vit_rules(path: str = "", name: str = "") -> list[Rule]:
    """Rules for CLIP's visual transformer.

    Args:
      path: what our paths start with, "" or ending in "/".
      name: what the torch names start with, "" or ending in ".".

    Returns:
      Rules for any width, depth and patch size, with or without the final projection.
    """
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


# A whole CLIP model holds the text tower too; only `visual.*` is the image encoder.
_TEXT_TOWER = (
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "token_embedding.weight",
    "ln_final.*",
    "transformer.*",
    "input_resolution",
    "context_length",
    "vocab_size",
)


def _hugging_face_rules() -> tuple[Rule, ...]:
    """The same transformer as Hugging Face's CLIP models name it."""
    tower = "vision_model."
    block, torch_block = "blocks", f"{tower}encoder.layers.{{layer}}"
    attention = [f"{torch_block}.self_attn.{part}_proj" for part in "qkv"]
    weights, biases = (tuple(f"{a}.{kind}" for a in attention) for kind in ("weight", "bias"))
    return (
        Rule("patch_embed/kernel", f"{tower}embeddings.patch_embedding.weight", CONV),
        Rule("class_embedding", f"{tower}embeddings.class_embedding"),
        Rule("position_embedding", f"{tower}embeddings.position_embedding.weight"),
        *layer("pre_norm", f"{tower}pre_layrnorm", norm=True),  # sic
        *layer(f"{block}/norm1", f"{torch_block}.layer_norm1", norm=True),
        Rule(f"{block}/attention/qkv/kernel", weights, DENSE),
        Rule(f"{block}/attention/qkv/bias", biases),
        *layer(f"{block}/attention/out", f"{torch_block}.self_attn.out_proj"),
        *layer(f"{block}/norm2", f"{torch_block}.layer_norm2", norm=True),
        *layer(f"{block}/mlp/fc1", f"{torch_block}.mlp.fc1"),
        *layer(f"{block}/mlp/fc2", f"{torch_block}.mlp.fc2"),
        *layer("post_norm", f"{tower}post_layernorm", norm=True),
        Rule("projection", "visual_projection.weight", DENSE),
    )


CLIP_VISUAL = RuleTable("CLIP visual encoder", tuple(vit_rules("", "visual.")), ignored=_TEXT_TOWER)
CLIP_HUGGING_FACE = RuleTable(
    "CLIP visual encoder (Hugging Face's names)",
    _hugging_face_rules(),
    ignored=(
        "text_model.*",
        "text_projection.weight",
        "logit_scale",
        "vision_model.embeddings.position_ids",
    ),
)
