"""The released layout of an understanding model: a Hugging Face folder that also has a projector.

config.json is that of the language model, with `mm_hidden_size` and `mm_projector_type`; the
weights lie in one .safetensors file or in shards with an index. What we write also notes the
fingerprint of the image tokenizer, as `tokenflow_fingerprint`.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenflow_jax import files
from tokenflow_jax.stages import Part
from tokenflow_jax.train import checkpoint
from tokenflow_jax.understanding.model import UnderstandingConfig
from tokenflow_jax.understanding.names import understanding_table, understanding_template
from tokenflow_jax.weights import conversion, language_model, rules
from tokenflow_jax.weights.conversion import Written, cast, torch_tensors
from tokenflow_jax.weights.lazy import LazyTensor

_KINDS = ("qwen2", "llama")  # a model_type such as llava_qwen2 holds one of them


def read_understanding_config(
    path: str | os.PathLike,
) -> tuple[UnderstandingConfig, Mapping[str, Any]]:
    """The hyper-parameters that a folder's config.json describes, and all that it says.

    Raises:
      ValueError: there is no config.json, or it describes no model that can be loaded.
    """
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); name the variant of these weights, or give a folder "
            "with a config.json"
        ) from error
    kind = str(fields.get("model_type", ""))
    found = "qwen2" if "qwen" in kind else next((k for k in _KINDS if k in kind), kind)
    found = "llama" if found == "llava" else found
    lm = language_model.config_from_json({**fields, "model_type": found}, str(file))
    config = UnderstandingConfig(
        lm,
        int(fields.get("mm_hidden_size", 40)),
        str(fields.get("mm_projector_type", "mlp2x_gelu")),
        str(fields.get("tokenflow_strategy", "last_scale")),
    )
    return config, fields


def save_understanding_model(
    path: str | os.PathLike,
    config: UnderstandingConfig,
    arrays: Mapping[str, Any],
    *,
    fingerprint: str = "",
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Written:
    """Writes a folder with the released layout.

    Args:
      path: the folder; it appears when it is complete.
      config: of the model.
      arrays: its parameters, nested, or by path as `conversion.open_source` has them.
      fingerprint: of the image tokenizer.
      dtype: of the files; None keeps that of the parameters.
      shard_bytes: weights beyond this are split over several files.
      overwrite: whether a folder there may be replaced.

    Returns:
      What was written.

    Raises:
      ValueError: the parameters are not this config's.
      OSError: the folder exists or cannot be written.
    """
    flat = arrays if any("/" in name for name in arrays) else rules.flatten(arrays)
    template = rules.flatten(understanding_template(config))
    wrong = sorted(
        name
        for name in flat.keys() | template.keys()
        if name not in flat or name not in template or flat[name].shape != template[name].shape
    )
    if wrong:
        raise ValueError(f"these parameters are not the config's: {', '.join(wrong)}")
    lazy = {
        name: x
        if isinstance(x, LazyTensor)
        else LazyTensor(name, x.shape, np.dtype(x.dtype), functools.partial(np.asarray, x))
        for name, x in flat.items()
    }
    tensors = torch_tensors(lazy, understanding_table(config))
    tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
    fields = language_model.config_to_json(
        config.lm, str(tensors["model.embed_tokens.weight"].dtype)
    )
    fields |= {
        "mm_hidden_size": config.vision_channels,
        "mm_projector_type": config.projector,
        "tokenflow_strategy": config.strategy,
        "tokenflow_fingerprint": fingerprint,
    }
    with files.write_atomically(path, overwrite) as partial:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        language_model.write_shards(partial, tensors, shard_bytes)
    return Written("raw", len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


# What a checkpoint of ours notes besides the model: which tokenizers it goes with.
_KEPT = ("tokenizer", "data")
# Files by which one knows that a folder holds a text tokenizer, too.
_TEXT_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    part: Part,
    *,
    config: UnderstandingConfig | None = None,
    folder: bool = False,
    dtype: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    tokenizer: Mapping[str, str] | None = None,
) -> Written:
    """Converts an understanding model; what is known of its tokenizers goes with it.

    Args:
      src, dst: as of `conversion.convert`; `src` may be a folder with the released layout.
      part: of understanding.
      config: of PyTorch weights without a config.json.
      folder: writes a folder with the released layout.
      dtype, step, overwrite: as of `conversion.convert`.
      tokenizer: of images, the one that it reads: "path", "variant" and "fingerprint".

    Raises:
      ValueError: the source is known to read another tokenizer; or see `conversion.convert`.
    """
    if conversion.is_torch(src):
        fields: Mapping[str, Any] = {}
        if config is None:
            config, fields = read_understanding_config(src)
        known = {"tokenizer": {"fingerprint": fields.get("tokenflow_fingerprint", "")}}
        if any((pathlib.Path(src) / name).is_file() for name in _TEXT_TOKENIZERS):
            known["data"] = {"text_tokenizer": os.fspath(src)}
    else:
        saved = checkpoint.read_info(checkpoint.find_checkpoint(src, step))["config"]
        known = {name: saved[name] for name in _KEPT if name in saved}
    if tokenizer is not None:
        own = known.get("tokenizer", {}).get("fingerprint")
        if own and own != tokenizer["fingerprint"]:
            raise ValueError(
                f"{os.fspath(src)} reads the tokenizer with the fingerprint {own}; "
                f"{tokenizer['path']} has {tokenizer['fingerprint']}: its codes mean something else"
            )
        known["tokenizer"] = dict(tokenizer)
    if not folder:
        return conversion.convert(
            src, dst, config, part=part, dtype=dtype, step=step, overwrite=overwrite, more=known
        )
    source = conversion.open_source(src, config, part=part, step=step)
    return save_understanding_model(
        dst,
        source.config,
        source.arrays,
        fingerprint=known.get("tokenizer", {}).get("fingerprint", ""),
        dtype=dtype,
        overwrite=overwrite,
    )
