"""Rules for the PatchGAN discriminator."""

from tokenflow_jax.convert.clip import layer
from tokenflow_jax.convert.rules import CONV, Rule, RuleTable


def patchgan_rules(layers: int = 3) -> RuleTable:
    """Builds the table for `models.discriminator.PatchGAN`.

    Args:
      layers: normalised layers but one, as in the model (3 in the reference).

    Returns:
      Rules between `main.*` and our variables {"params": ..., "batch_stats": ...}.
    """
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
