"""Rules for `nets.lm.Decoder`, by Hugging Face's names of Llama and Qwen2."""

from tokenflow_jax.weights.rules import DENSE, Rule


def decoder_rules(path: str = "", name: str = "model.", head: str = "lm_head") -> list[Rule]:
    """Rules for a decoder of any size, with or without biases, an own head and QK-norm.

    Args:
      path: what our paths start with, "" or ending in "/".
      name: what the torch names start with, "" or ending in ".".
      head: torch name of the head's module.
    """
    block, layer = f"{path}blocks", f"{name}layers.{{layer}}"
    attention = [
        rule
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj"))
        for rule in (
            Rule(f"{block}/attention/{ours}/kernel", f"{layer}.self_attn.{theirs}.weight", DENSE),
            Rule(f"{block}/attention/{ours}/bias", f"{layer}.self_attn.{theirs}.bias"),
        )
    ]
    return [
        Rule(f"{path}embed/embedding", f"{name}embed_tokens.weight"),
        *attention,
        Rule(f"{block}/attention/q_norm/scale", f"{layer}.self_attn.qknorm.query_norm.weight"),
        Rule(f"{block}/attention/k_norm/scale", f"{layer}.self_attn.qknorm.key_norm.weight"),
        *(
            Rule(f"{block}/mlp/{part}/kernel", f"{layer}.mlp.{part}_proj.weight", DENSE)
            for part in ("gate", "up", "down")
        ),
        Rule(f"{block}/norm1/scale", f"{layer}.input_layernorm.weight"),
        Rule(f"{block}/norm2/scale", f"{layer}.post_attention_layernorm.weight"),
        Rule(f"{path}norm/scale", f"{name}norm.weight"),
        Rule(f"{path}head/kernel", f"{head}.weight", DENSE),
    ]
