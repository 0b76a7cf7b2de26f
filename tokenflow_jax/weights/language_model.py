"""Language models in Hugging Face's format, Llama and Qwen2: a folder with config.json and weights.

    config, params = load_language_model("Qwen2.5-0.5B-Instruct", dtype="bfloat16")
    save_language_model("folder", config, params)
    gguf_to_folder("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")

Loading holds the result and one tensor of the file in memory.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.nets.lm import Decoder, LMConfig
from tokenflow_jax.weights.conversion import Written, cast
from tokenflow_jax.weights.folder import read_fields, write_folder
from tokenflow_jax.weights.formats import gguf
from tokenflow_jax.weights.formats.torch import StateDict, open_state_dict
from tokenflow_jax.weights.names.decoder import decoder_rules, gguf_config_fields, gguf_tensors
from tokenflow_jax.weights.rules import RuleTable, Tensors, flax_arrays, unflatten


def language_model_table(config: LMConfig) -> RuleTable:
    """Return the rules of a Hugging Face Llama or Qwen2."""
    head = ("lm_head.weight",) if config.tied_head else ()  # may be in the file of a tied model
    ignored = ("*.rotary_emb.inv_freq", *head)
    return RuleTable("language model", tuple(decoder_rules()), ignored=ignored)


@functools.cache
def language_model_template(config: LMConfig) -> Mapping[str, Any]:
    """Return the shapes of the decoder's parameters, without computing any."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(Decoder(config).init, method="whole")
    return jax.eval_shape(init, jax.random.key(0), ids)["params"]


_SIZES = {
    "vocab_size": "vocabulary_size", "hidden_size": "width", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "intermediate_size": "mlp_width",
}  # fmt: skip


# The largest sizes that are believed: a layer has ten names, a channel a row of a matrix.
_MOST = {"num_hidden_layers": 10_000, "": 2**24}


def config_from_json(fields: Mapping[str, Any], where: str = "config.json") -> LMConfig:
    """Return the hyper-parameters that the fields of a Hugging Face config.json describe.

    Another architecture or features that this decoder lacks are a ValueError about `where`.
    """
    kind, most = fields.get("model_type"), _MOST
    problems = [f"{name} is missing" for name in _SIZES if name not in fields]
    if kind not in ("llama", "qwen2"):
        problems.append(f"model_type {shown(kind)}: one of llama, qwen2")
    # transformers 5 keeps both in one entry.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters or rope_scaling is {shown(rope)}, not an object")
        rope = {}
    heads = fields.get("num_attention_heads")
    sizes = {name: fields[name] for name in _SIZES if name in fields} | {
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or 0,
    }
    theta = fields.get("rope_theta") or rope.get("rope_theta") or 10000.0
    numbers = {"rope_theta": theta, "rms_norm_eps": fields.get("rms_norm_eps", 1e-6)}
    problems += [
        f"{name} is {shown(size)}, not a whole number up to {most.get(name, most['']):,}"
        for name, size in sizes.items()
        if type(size) is not int or not (name != "head_dim") <= size <= most.get(name, most[""])
    ]
    problems += [
        f"{name} is {shown(number)}, not a number from 0 to 1e12"
        for name, number in numbers.items()
        if type(number) not in (int, float) or not 0 <= number <= 1e12
    ]
    wanted = {
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "attention_bias": (fields.get("attention_bias", False) and kind == "llama", False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
        "use_sliding_window": (fields.get("use_sliding_window", False), False),
    }
    problems += [
        f"{name} is {shown(have)}; this decoder only has {want!r}"
        for name, (have, want) in wanted.items()
        if have != want
    ]
    if problems:
        raise ValueError(f"{where} is no model that can be loaded:\n{bullets(problems)}")
    try:
        return LMConfig(
            **{ours: sizes[theirs] for theirs, ours in _SIZES.items()},
            kv_heads=sizes["num_key_value_heads"],
            head_width=sizes["head_dim"],
            rope_theta=float(theta),
            norm_eps=float(numbers["rms_norm_eps"]),
            qkv_bias=kind == "qwen2",
            tied_head=bool(fields.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_to_json(config: LMConfig) -> dict[str, Any]:
    """Return a config.json for the same model in transformers; ValueError if that has none."""
    problems = []
    if config.norms != "before" or config.qk_norm:
        problems.append("norms after the sublayers and QK-norm are not in Llama or Qwen2")
    if config.qkv_bias and config.head_channels * config.heads != config.width:
        problems.append("Qwen2's heads together are as wide as the model")
    if problems:
        raise ValueError("the model cannot be saved for transformers: " + "; ".join(problems))
    kind = "Qwen2" if config.qkv_bias else "Llama"
    own = {} if config.qkv_bias else {"head_dim": config.head_channels}
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        **own,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "float32",  # or what `write_folder` writes
    }


def read_config(path: str | os.PathLike) -> LMConfig:
    """Return the config of a Hugging Face folder; a missing or unknown one is a ValueError."""
    return config_from_json(*read_fields(path))


def load_language_model(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
) -> tuple[LMConfig, dict[str, Any]]:
    """Load a language model; return its config and the nested parameters of `Decoder`.

    A damaged file or a model that does not fit is a ValueError with all reasons.

    Args:
      path: a folder in Hugging Face's format (one .safetensors file or shards with an index), one
        weight file beside its config.json, or a .gguf file.
      dtype: of the parameters; None keeps the file's.
    """
    config, arrays = open_language_model(path, dtype)
    return config, unflatten({name: tensor.read() for name, tensor in arrays.items()})


def open_language_model(
    path: str | os.PathLike, dtype: str | None = None
) -> tuple[LMConfig, Tensors]:
    """Open a language model; return its config and the arrays of `Decoder` by path, not yet read.

    See `load_language_model`.
    """
    if gguf.is_gguf(path):
        fields, tensors = gguf.read_gguf(path)
        fields = gguf_config_fields(fields, tied="output.weight" not in tensors)
        config = config_from_json(fields, os.fspath(path))
        state = StateDict(gguf_tensors(tensors, config), path=os.fspath(path))
    else:
        config = read_config(path)
        state = open_state_dict(path)
    # Each tensor, not the array made of them: memory holds the result and one tensor of the file.
    cast_state = {name: cast(tensor, dtype) for name, tensor in state.items()}
    state = StateDict(cast_state, state.files, state.path)
    arrays = flax_arrays(state, language_model_table(config), language_model_template(config))
    return config, arrays


def save_language_model(
    path: str | os.PathLike,
    config: LMConfig,
    params: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> Written:
    """Save a language model as a folder that transformers loads; see `write_folder`.

    `more` are further fields of config.json, such as `eos_token_id`.
    """
    fields = config_to_json(config) | dict(more or {})
    table, template = language_model_table(config), language_model_template(config)
    return write_folder(path, fields, params, table, template, **options)


def gguf_to_folder(
    path: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None
) -> LMConfig:
    """Write weights (float32 by default), config and text tokenizer of a GGUF file as a folder."""
    tokenizer = gguf.text_tokenizer(path)
    config, arrays = open_language_model(path, dtype)
    known, _ = gguf.read_gguf(path)
    ids = {name: f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id")}
    more = {name: known[key] for name, key in ids.items() if key in known}
    save_language_model(folder, config, arrays, more=more)
    tokenizer.save_pretrained(os.fspath(folder))
    return config
