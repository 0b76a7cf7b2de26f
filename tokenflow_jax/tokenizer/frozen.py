"""The tokenizer as the language models use it: frozen, its codes computed at full precision."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax import hub
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.train import checkpoint_info
from tokenflow_jax.weights import record
from tokenflow_jax.weights.conversion import (
    Source,
    is_torch,
    knows_itself,
    open_source,
    variant_config,
)

# Of the encoders in a language model's step: "high" is three bfloat16 passes on TPUs, where
# "highest" is six, but TF32 on GPUs; "bfloat16" computes in it; "auto" is "high" on TPUs, else
# "highest".
PRECISIONS = ("auto", "highest", "high", "bfloat16")
_DECODERS = ("pixel_decoder", "pixel_out", "semantic_decoder", "semantic_out_1", "semantic_out_2")


def full_precision(
    dtype: jnp.dtype | str, precision: str = "highest"
) -> contextlib.AbstractContextManager:
    """Compute float32 products in full on every accelerator: a code is an argmin."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision(precision) if exact else contextlib.nullcontext()


def image_codes(
    model: TokenFlow, params: Any, images_BHWC: jax.Array, precision: str = "highest"
) -> jax.Array:
    """Return the int32 codes (B, L) of images, uint8 or in [-1, 1], without gradient.

    `precision` is that of a float32 model's encoders, one of PRECISIONS but "auto"; the quantizer's
    products are always full.
    """
    if images_BHWC.dtype == jnp.uint8:
        images_BHWC = to_float(images_BHWC)
    variables = {"params": params}
    encoders = model.clone(dtype=jnp.bfloat16) if precision == "bfloat16" else model
    with full_precision(encoders.dtype, precision):
        features = encoders.apply(variables, images_BHWC, method="encode")
    with full_precision(model.dtype):
        codes_BL = model.apply(variables, features, method="quantize").codes_BL
    return jax.lax.stop_gradient(codes_BL)


def encoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the parameters that `image_codes` reads: encoders and codebooks, no decoders."""
    return {name: part for name, part in params.items() if name not in _DECODERS}


def open_weights(
    path: str | os.PathLike,
    variant: str | None = None,
    *,
    ema: bool = True,
    step: int | None = None,
    **changes: Any,
) -> tuple[str, Source]:
    """Open a tokenizer without reading its arrays; return also the path that was opened.

    See `Tokenizer.load`; `changes` override fields of a PyTorch file's variant, None keeps them.
    """
    path = os.fspath(path)
    changes = {name: value for name, value in changes.items() if value is not None}
    config = variant_config(path, variant, VARIANTS)
    path = record.part_in(path, PART.stage)
    if changes and config is None:
        raise ValueError(f"{path} knows its own {' and '.join(changes)}: leave them out")
    if changes:
        config = dataclasses.replace(config, **changes)
    return path, open_source(path, PART, config, weights=None if ema else "raw", step=step)


def find_config(tokenizer: ml_collections.ConfigDict) -> TokenizerConfig:
    """Return the hyper-parameters of the tokenizer that `config.tokenizer` names.

    `path` is a checkpoint of ours or a PyTorch file; `variant` is needed for the latter, and
    suffices where only shapes matter.
    """
    path, variant = tokenizer.path, tokenizer.variant
    if not variant and (release := hub.release_of(path)):
        variant = release.variant
    if variant:
        if variant not in VARIANTS:
            raise ValueError(
                f"tokenizer.variant {variant!r} is unknown; the variants are {sorted(VARIANTS)}"
            )
        return VARIANTS[variant]
    path = path and record.part_in(path, PART.stage)
    if path and is_torch(path) and knows_itself(path):
        return open_source(path, PART).config
    if not path or is_torch(path):
        raise ValueError(
            f"tokenizer.path {path!r}: say which model it is with --config.tokenizer.variant=, one "
            f"of {sorted(VARIANTS)}"
        )
    try:
        saved = checkpoint_info.read_info(checkpoint_info.find_checkpoint(path))["config"]
    except checkpoint_info.CheckpointError as error:
        raise ValueError(
            f"tokenizer.path: {error}; train the quickstart's tokenizer with python -m "
            "tokenflow_jax.main --config=configs/tokenizer.py --workdir=runs/quickstart"
        ) from error
    if saved.get("stage") != "tokenizer":
        raise ValueError(f"tokenizer.path {path!r} is a run of stage {saved.get('stage')!r}")
    return TokenizerConfig(**saved["model"]).finished


def check_shared_index(config: TokenizerConfig, path: str | os.PathLike) -> None:
    """Raise ValueError unless language models can read and write the tokenizer's codes."""
    quantizer = config.quantizer
    if not quantizer.shared_index:
        raise ValueError(
            f"the image tokenizer {os.fspath(path)!r} has quantizer.kind {quantizer.kind!r}, "
            f"mapping {quantizer.mapping!r} and heads {quantizer.heads}: language models need "
            "one code for a token, which selects a row in two codebooks; train it with mapping "
            "'shared', 1 head and another kind than 'lfq' and 'fsq'"
        )
