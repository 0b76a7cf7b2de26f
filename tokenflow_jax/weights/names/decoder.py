"""Names of `nets.lm.Decoder` in checkpoints: Hugging Face's of Llama and Qwen2, and GGUF's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.weights.lazy import LazyTensor
from tokenflow_jax.weights.rules import Rule, Tensors, layer
from tokenflow_jax.weights.transforms import DENSE

# Hugging Face's name -> GGUF's, and the other way round.
_GGUF_FIELDS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "intermediate_size": "feed_forward_length",
}  # fmt: skip
GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def decoder_rules(path: str = "") -> list[Rule]:
    """Return rules for a decoder, with or without biases, a head of its own and QK-norm.

    `path` is what our paths start with, "" or ending in "/".
    """
    block, torch_block = f"{path}blocks", "model.layers.{layer}"
    ours, theirs = f"{block}/attention", f"{torch_block}.self_attn"
    return [
        Rule(f"{path}embed/embedding", "model.embed_tokens.weight"),
        *layer(f"{ours}/q", f"{theirs}.q_proj"),
        *layer(f"{ours}/k", f"{theirs}.k_proj"),
        *layer(f"{ours}/v", f"{theirs}.v_proj"),
        *layer(f"{ours}/out", f"{theirs}.o_proj"),
        Rule(f"{ours}/q_norm/scale", f"{theirs}.qknorm.query_norm.weight"),
        Rule(f"{ours}/k_norm/scale", f"{theirs}.qknorm.key_norm.weight"),
        *(
            Rule(f"{block}/mlp/{part}/kernel", f"{torch_block}.mlp.{part}_proj.weight", DENSE)
            for part in ("gate", "up", "down")
        ),
        Rule(f"{block}/norm1/scale", f"{torch_block}.input_layernorm.weight"),
        Rule(f"{block}/norm2/scale", f"{torch_block}.post_attention_layernorm.weight"),
        Rule(f"{path}norm/scale", "model.norm.weight"),
        Rule(f"{path}head/kernel", "lm_head.weight", DENSE),
    ]


def gguf_config_fields(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return a GGUF header as the fields of a config.json; `tied`: the file has no head."""
    kind = fields.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    found = {theirs: own[ours] for theirs, ours in _GGUF_FIELDS.items() if ours in own}
    tokens = fields.get("tokenizer.ggml.tokens")
    size = own.get("vocab_size") or (len(tokens) if isinstance(tokens, list) else 0)
    if size:
        found["vocab_size"] = size
    epsilon = own.get("attention.layer_norm_rms_epsilon", 1e-6)
    scaling = own.get("rope.scaling.type", "none")
    if scaling != "none":
        found["rope_scaling"] = {"rope_type": scaling}
    if kind == "llama" and own.get("attention.key_length"):
        found["head_dim"] = own["attention.key_length"]
    return {
        "model_type": kind,
        **found,
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "rope_theta": own.get("rope.freq_base", 10000.0),
        # A float32 in the file: 1e-5 is not 9.999999747378752e-06.
        "rms_norm_eps": float(f"{epsilon:.6g}") if isinstance(epsilon, float) else epsilon,
        "tie_word_embeddings": tied,
    }


def gguf_tensors(tensors: Tensors, config: LMConfig) -> Tensors:
    """Return the tensors of a GGUF file by Hugging Face's names; unknown names stay."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        *block, part = module.split(".")
        full = name
        if block[:1] == ["blk"] and len(block) == 2:
            full = f"model.layers.{block[1]}.{GGUF_NAMES.get(part, part)}.{kind}"
        elif not block and part in GGUF_NAMES:
            full = f"{GGUF_NAMES[part]}.{kind}"
        if part in ("attn_q", "attn_k") and not config.qkv_bias:
            tensor = _uninterleaved(tensor, config.heads if part == "attn_q" else config.kv_heads)
        renamed[full] = dataclasses.replace(tensor, name=full)
    return renamed


def _uninterleaved(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Restore the row order of a Llama's queries and keys.

    GGUF interleaves the two halves of each head, (0, D / 2, 1, D / 2 + 1, ...), as its rotation
    pairs neighbors.
    """

    def load() -> np.ndarray:
        array = tensor.read()
        halves = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return halves.swapaxes(1, 2).reshape(array.shape)

    return LazyTensor(tensor.name, tensor.shape, tensor.dtype, load)
