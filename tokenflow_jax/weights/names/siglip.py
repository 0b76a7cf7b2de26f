"""Rules for the vision tower of SigLIP, alone or inside another checkpoint."""

from tokenflow_jax.weights.names.clip import layer
from tokenflow_jax.weights.rules import CONV, DENSE, Rule, RuleTable

# What stands before the tower's names in a tokenizer or a file of SigLIP itself.
TOWER = "vision_model."


def siglip_rules(path: str = "", name: str = "") -> list[Rule]:
    """Rules for SigLIP's vision tower up to any of its layers.

    Args:
      path: what our paths start with, "" or ending in "/".
      name: what the torch names start with, "" or ending in ".".

    Returns:
      Rules for any width, depth and patch size.
    """
    block, torch_block = f"{path}blocks", f"{name}encoder.layers.{{layer}}"
    attention = [f"{torch_block}.self_attn.{part}_proj" for part in "qkv"]
    weights, biases = (tuple(f"{a}.{kind}" for a in attention) for kind in ("weight", "bias"))
    return [
        *layer(f"{path}patch_embed", f"{name}embeddings.patch_embedding", CONV),
        Rule(f"{path}position_embedding", f"{name}embeddings.position_embedding.weight"),
        *layer(f"{block}/norm1", f"{torch_block}.layer_norm1", norm=True),
        Rule(f"{block}/attention/qkv/kernel", weights, DENSE),
        Rule(f"{block}/attention/qkv/bias", biases),
        *layer(f"{block}/attention/out", f"{torch_block}.self_attn.out_proj"),
        *layer(f"{block}/norm2", f"{torch_block}.layer_norm2", norm=True),
        *layer(f"{block}/mlp/fc1", f"{torch_block}.mlp.fc1"),
        *layer(f"{block}/mlp/fc2", f"{torch_block}.mlp.fc2"),
    ]


def unused_shapes(depth: int, width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    """The parts of the tower that TokenFlow never reads: last layer, final norm, pooling head.

    Args:
      depth: layers that are read; the one after them is not.
      width, mlp_width: of the tower.

    Returns:
      Torch names (without the tower's prefix) and shapes.
    """

    def affine(name: str, out: int, *inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}

    last = f"encoder.layers.{depth}"
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("q", "k", "v", "out"):
        shapes |= affine(f"{last}.self_attn.{part}_proj", width, width)
    for norm in (f"{last}.layer_norm1", f"{last}.layer_norm2", "post_layernorm", "head.layernorm"):
        shapes |= affine(norm, width)
    for mlp in (f"{last}.mlp", "head.mlp"):
        shapes |= affine(f"{mlp}.fc1", mlp_width, width) | affine(f"{mlp}.fc2", width, mlp_width)
    return shapes | {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **affine("head.attention.out_proj", width, width),
    }


# Of a whole SigLIP model the text tower and what follows the hidden state are left alone; layers
# beyond the model's depth are too.
SIGLIP_VISION = RuleTable(
    "SigLIP vision tower",
    tuple(siglip_rules("", TOWER)),
    ignored=(
        f"{TOWER}post_layernorm.*",
        f"{TOWER}head.*",
        f"{TOWER}encoder.layers.*",
        f"{TOWER}embeddings.position_ids",
        "text_model.*",
        "logit_scale",
        "logit_bias",
    ),
)
