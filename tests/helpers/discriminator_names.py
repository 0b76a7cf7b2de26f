"""The discriminators' names in the reference's checkpoints."""

from tokenflow_jax.weights.rules import Rule, RuleTable, layer
from tokenflow_jax.weights.transforms import CONV


def patchgan_rules(layers: int = 3) -> RuleTable:
    """Return rules between `main.*` and our variables {"params": ..., "batch_stats": ...}."""
    rules = [*layer("params/conv_0", "main.0", CONV)]
    for i in range(1, layers + 1):
        # The torch module is one list: conv, norm, activation, three entries per layer.
        conv, norm = f"main.{3 * i - 1}", f"main.{3 * i}"
        rules.append(Rule(f"params/conv_{i}/kernel", f"{conv}.weight", CONV))
        rules += layer(f"params/norm_{i}", norm, norm=True)
        rules.append(Rule(f"batch_stats/norm_{i}/mean", f"{norm}.running_mean"))
        rules.append(Rule(f"batch_stats/norm_{i}/var", f"{norm}.running_var"))
    rules += layer("params/conv_out", f"main.{3 * layers + 2}", CONV)
    return RuleTable(
        "PatchGAN discriminator", tuple(rules), buffers=("main.*.num_batches_tracked",)
    )


def stylegan_rules(image_size: int) -> RuleTable:
    """Return rules between the reference's names and our variables {"params": ...}."""
    rules = layer("params/conv_in", "blocks.0", CONV)
    for i in range(image_size.bit_length() - 3):
        ours, theirs = f"params/block_{i}", f"blocks.{i + 2}"
        rules += layer(f"{ours}_shortcut", f"{theirs}.conv_res", CONV)
        rules += layer(f"{ours}_conv1", f"{theirs}.net.0", CONV)
        rules += layer(f"{ours}_conv2", f"{theirs}.net.2", CONV)
        rules += layer(f"{ours}_down", f"{theirs}.downsample.1", CONV)
    rules += layer("params/conv_out", "final_conv.0", CONV)
    rules += layer("params/hidden", "final_linear.0") + layer("params/out", "final_linear.2")
    buffers = ("blocks.*.downsample.0.f",)  # the blur's kernel
    return RuleTable("StyleGAN discriminator", tuple(rules), buffers=buffers)
