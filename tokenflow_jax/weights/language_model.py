"""Language models in Hugging Face's format, Llama and Qwen2: a folder with config.json and weights.

    config, params = load_language_model("Qwen2.5-0.5B-Instruct", dtype="bfloat16")
    save_language_model("folder", config, params)

No torch and no transformers are needed. What is in memory while loading is the result and one
tensor of the file; with `place`, one of our arrays (the layers of one parameter) and one tensor.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax import files
from tokenflow_jax.nets.lm import Decoder, LMConfig
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.conversion import Tensors, cast, torch_tensors
from tokenflow_jax.weights.formats.torch import open_state_dict, write_safetensors
from tokenflow_jax.weights.lazy import LazyTensor
from tokenflow_jax.weights.names.decoder import decoder_rules
from tokenflow_jax.weights.rules import RuleTable

_SHARD = 5 * 10**9  # bytes
_IGNORED = ("*.rotary_emb.inv_freq",)


def language_model_table(config: LMConfig) -> RuleTable:
    """The rules of a Hugging Face Llama or Qwen2; a tied head may be in a file, too."""
    ignored = (*_IGNORED, "lm_head.weight") if config.tied_head else _IGNORED
    return RuleTable("language model", tuple(decoder_rules()), ignored=ignored)


@functools.cache
def language_model_template(config: LMConfig) -> Mapping[str, Any]:
    """Shapes of the decoder's parameters, without computing any."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(Decoder(config).init, method="whole")
    return jax.eval_shape(init, jax.random.key(0), ids)["params"]


_SIZES = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}


def config_from_json(fields: Mapping[str, Any], where: str = "config.json") -> LMConfig:
    """The hyper-parameters that a Hugging Face config.json describes.

    Args:
      fields: the file's content.
      where: its name, for messages.

    Returns:
      The config, with default `remat` and `attention`.

    Raises:
      ValueError: another architecture, or features that this decoder does not have; all of them.
    """
    kind = fields.get("model_type")
    problems = [f"{name} is missing" for name in _SIZES if name not in fields]
    if kind not in ("llama", "qwen2"):
        problems.append(f"model_type {kind!r}: one of llama, qwen2")
    # transformers 5 keeps both in one entry.
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope_type, "default"),
        "attention_bias": (fields.get("attention_bias", False) and kind == "llama", False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
        "use_sliding_window": (fields.get("use_sliding_window", False), False),
    }
    problems += [
        f"{name} is {have!r}; this decoder only has {want!r}"
        for name, (have, want) in wanted.items()
        if have != want
    ]
    if problems:
        raise ValueError(
            f"{where} describes no model that can be loaded:\n  " + "\n  ".join(problems)
        )
    try:
        return LMConfig(
            **{ours: fields[theirs] for theirs, ours in _SIZES.items()},
            kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            head_width=fields.get("head_dim") or 0,
            rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            qkv_bias=kind == "qwen2",
            tied_head=bool(fields.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_to_json(config: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of a config.json that transformers loads as the same model.

    Raises:
      ValueError: Hugging Face has no such architecture.
    """
    problems = []
    if config.norms != "before" or config.qk_norm:
        problems.append("norms after the sublayers and QK-norm are not in Llama or Qwen2")
    if config.qkv_bias and config.head_channels * config.heads != config.width:
        problems.append("Qwen2's heads together are as wide as the model")
    if problems:
        raise ValueError("the model cannot be saved for transformers: " + "; ".join(problems))
    kind, architecture = (
        ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    )
    own = {} if config.qkv_bias else {"head_dim": config.head_channels}
    return {
        "architectures": [architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        **own,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,
    }


def read_config(path: str | os.PathLike) -> LMConfig:
    """The config of a Hugging Face folder; see `config_from_json`.

    Raises:
      ValueError: there is no readable config.json in the folder, or its model cannot be loaded.
    """
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{file} is missing; give a folder in Hugging Face's format, with config.json and "
            ".safetensors files"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); fetch it again") from None
    return config_from_json(fields, str(file))


def load_language_model(
    path: str | os.PathLike,
    *,
    config: LMConfig | None = None,
    dtype: str | None = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> tuple[LMConfig, dict[str, Any]]:
    """Loads a language model.

    Args:
      path: a folder in Hugging Face's format (one .safetensors file or shards with an index), one
        weight file beside its config.json, or a .gguf file (see `weights.formats.gguf`).
      config: what to expect instead of what config.json says.
      dtype: of the parameters; None keeps the file's.
      place: (our path, array) -> what to keep of it, called for one array after the other: put
        it on its devices here, and the host never holds the whole model.

    Returns:
      The config and the parameters of `Decoder`, a nested dict.

    Raises:
      CheckpointMismatch: names or shapes that do not fit, all of them.
      ValueError: no such file, a damaged one, or a model of another architecture.
    """
    if os.fspath(path).endswith(".gguf"):
        from tokenflow_jax.weights.formats import gguf

        found, arrays = gguf.open_gguf(path, config)
        return found, rules.unflatten(dict(_placed(arrays, dtype, place)))
    config = config or read_config(path)
    state = open_state_dict(path)
    arrays = rules.iterate_flax(
        {name: cast(tensor, dtype) for name, tensor in state.items()},
        language_model_table(config),
        language_model_template(config),
        cast=False,
    )
    return config, rules.unflatten(dict(_placed(arrays, None, place)))


def _placed(
    arrays: Iterator[tuple[str, np.ndarray]],
    dtype: str | None,
    place: Callable[[str, np.ndarray], Any] | None,
) -> Iterator[tuple[str, Any]]:
    for path, array in arrays:
        array = array if dtype is None else array.astype(jnp.dtype(dtype), copy=False)
        yield path, array if place is None else place(path, array)


def save_language_model(
    path: str | os.PathLike,
    config: LMConfig,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    more: Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD,
    overwrite: bool = False,
) -> None:
    """Saves a language model as a folder that transformers loads.

    Args:
      path: the folder to write; it appears when it is complete.
      config, params: as of `load_language_model`.
      dtype: of the file; None keeps that of the parameters.
      more: further entries of config.json, such as `eos_token_id`.
      shard_bytes: weights beyond this are split over several files.
      overwrite: whether a folder there may be replaced.

    Raises:
      ValueError: transformers has no such architecture, or the parameters are not this config's.
      OSError: the folder exists or cannot be written.
    """
    fields = config_to_json(config)
    flat, template = rules.flatten(params), rules.flatten(language_model_template(config))
    wrong = [
        f"{name}: {_shape(flat, name)} given, {_shape(template, name)} in the config"
        for name in sorted(flat.keys() | template.keys())
        if _shape(flat, name) != _shape(template, name)
    ]
    if wrong:
        raise ValueError("these parameters are not the config's:\n  " + "\n  ".join(wrong))
    arrays = {
        name: LazyTensor(name, x.shape, np.dtype(x.dtype), functools.partial(np.asarray, x))
        for name, x in flat.items()
    }
    tensors = torch_tensors(arrays, language_model_table(config))
    tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
    fields["torch_dtype"] = str(tensors["model.embed_tokens.weight"].dtype)
    with files.write_atomically(path, overwrite) as partial:
        partial.mkdir(parents=True)
        text = json.dumps(fields | dict(more or {}), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        write_shards(partial, tensors, shard_bytes)


def _shape(flat: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(flat[name].shape) if name in flat else None


def write_shards(folder: pathlib.Path, tensors: Tensors, shard_bytes: int) -> None:
    """One file, or several with Hugging Face's index."""
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
