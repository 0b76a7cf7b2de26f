"""The released layout of an understanding model: a Hugging Face folder that also has a projector.

config.json is that of the language model, with `mm_hidden_size` and `mm_projector_type`; the
weights lie in one .safetensors file or in shards with an index. What we write also notes the
fingerprint of the image tokenizer, as `tokenflow_fingerprint`.
"""

import os
from collections.abc import Mapping
from typing import Any

from tokenflow_jax import remote
from tokenflow_jax.messages import one_line, shown
from tokenflow_jax.understanding.model import VARIANTS, UnderstandingConfig
from tokenflow_jax.understanding.names import PART
from tokenflow_jax.weights import conversion, language_model
from tokenflow_jax.weights.conversion import Written
from tokenflow_jax.weights.folder import read_fields, write_folder

_KINDS = ("qwen2", "llama")  # a model_type such as llava_qwen2 holds one of them


def read_understanding_config(
    path: str | os.PathLike,
) -> tuple[UnderstandingConfig, Mapping[str, Any]]:
    """Return the hyper-parameters that a folder's config.json describes, and all its fields."""
    try:
        fields, file = read_fields(path)
    except ValueError as error:
        raise ValueError(f"{error}, or name the variant of these weights") from error
    kind = fields.get("model_type", "")
    kind = kind if isinstance(kind, str) else shown(kind)
    found = "qwen2" if "qwen" in kind else next((k for k in _KINDS if k in kind), kind)
    found = "llama" if found == "llava" else found
    lm = language_model.config_from_json({**fields, "model_type": found}, file)
    channels = fields.get("mm_hidden_size", 40)
    if type(channels) is not int or not 0 < channels < 2**24:
        raise ValueError(f"{file}: mm_hidden_size is {shown(channels)}, not a number of channels")
    try:
        config = UnderstandingConfig(
            lm,
            channels,
            str(fields.get("mm_projector_type", "mlp2x_gelu"))[:99],
            str(fields.get("tokenflow_strategy", "last_scale"))[:99],
        )
    except ValueError as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    return config, fields


def torch_config(
    path: str, variant: str | None
) -> tuple[UnderstandingConfig | None, Mapping[str, Any]]:
    """Return the config of PyTorch weights and what is known of their tokenizers."""
    if variant is None and conversion.knows_itself(path):
        return None, {}
    if variant is not None:
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r}: one of {', '.join(VARIANTS)}")
        return VARIANTS[variant], {}
    config, fields = read_understanding_config(path)
    fingerprint = fields.get("tokenflow_fingerprint", "")
    return config, {"tokenizer": {"fingerprint": fingerprint}, "text_tokenizer": path}


def save_understanding_model(
    path: str | os.PathLike,
    config: UnderstandingConfig,
    arrays: Mapping[str, Any],
    *,
    fingerprint: str = "",
    **options: Any,
) -> Written:
    """Write a folder with the released layout; see `weights.folder.write_folder`.

    `fingerprint` is that of the image tokenizer.
    """
    fields = language_model.config_to_json(config.lm) | {
        "mm_hidden_size": config.vision_channels,
        "mm_projector_type": config.projector,
        "tokenflow_strategy": config.strategy,
        "tokenflow_fingerprint": fingerprint,
    }
    return write_folder(path, fields, arrays, PART.table(config), PART.template(config), **options)


# Any of these files shows that a folder holds a text tokenizer, too.
_TEXT_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    config: UnderstandingConfig | None = None,
    *,
    folder: bool = False,
    tokenizer: Mapping[str, str] | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
) -> Written:
    """Convert an understanding model and what is known of its tokenizers.

    Args (the others are those of `conversion.convert`):
      src: may also be a folder with the released layout.
      config: of PyTorch weights without a config.json.
      folder: write a folder with the released layout.
      tokenizer: "path", "variant" and "fingerprint" of the image tokenizer that the model reads;
        a source that is known to read another one is a ValueError.
    """
    fields: Mapping[str, Any] = {}
    if config is None and not conversion.knows_itself(src):
        config, fields = read_understanding_config(src)
    which, how = {"weights": weights, "step": step}, {"dtype": dtype, "overwrite": overwrite}
    source = conversion.open_source(src, PART, config, **which)
    own = source.saved.get("tokenizer", {}).get("fingerprint") or ""
    known: dict[str, Any] = {}
    if not source.saved:
        own = fields.get("tokenflow_fingerprint", "")
        known["tokenizer"] = {"fingerprint": own}
        if any(remote.kind_of(remote.join(src, name)) == "file" for name in _TEXT_TOKENIZERS):
            known["text_tokenizer"] = os.fspath(src)
    if tokenizer is not None:
        if own and own != tokenizer["fingerprint"]:
            raise ValueError(
                f"{os.fspath(src)} reads the tokenizer with the fingerprint {own}; "
                f"{tokenizer['path']} has {tokenizer['fingerprint']}: its codes mean something else"
            )
        own, known["tokenizer"] = tokenizer["fingerprint"], dict(tokenizer)
    if not folder:
        return conversion.convert(src, dst, PART, config, more=known, **which, **how)
    written = save_understanding_model(dst, source.config, source.arrays, fingerprint=own, **how)
    return written._replace(weights=source.weights)
