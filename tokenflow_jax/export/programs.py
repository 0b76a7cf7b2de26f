"""What is exported of a tokenizer: pictures to codes, codes to features, codes to pixels."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenflow_jax.evals.image_set import CROP
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.frozen import full_precision
from tokenflow_jax.tokenizer.pyramid import map_of_vectors

_INSTALL = "pip install 'tokenflow_jax[export]' && pip install --no-deps jax2onnx==0.17.1"


def require(*packages: str) -> None:
    """Raise ValueError unless packages that nothing else needs are there."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"exporting needs {' and '.join(missing)}: {_INSTALL}")


class Program(NamedTuple):
    """A pure function of one array whose first axis is the batch; the weights are inside."""

    name: str
    input: str
    output: str
    shape: tuple[int, ...]  # of the input, without the batch
    dtype: jnp.dtype  # of the input
    function: Callable[[jax.Array], jax.Array]

    def spec(self, batch: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *self.shape), self.dtype)


def programs(tokenizer: Tokenizer) -> list[Program]:
    """Return the programs encode, decode and features of a tokenizer."""
    config, params = tokenizer.config, tokenizer.params
    codebooks = tokenizer.codebooks
    picture, codes = (config.image_size, config.image_size, 3), (config.length,)

    def encode(images_BHWC: jax.Array) -> jax.Array:
        return tokenizer.encode_fn(params, images_BHWC)

    def maps(codes_BL: jax.Array) -> jax.Array:
        # -1 instead of a code adds nothing: one program decodes any number of scales.
        known_BLH = (codes_BL >= 0).reshape(codes_BL.shape[0], -1, config.quantizer.heads)
        vectors_BLC = codebooks.look_up(jnp.maximum(codes_BL, 0))
        vectors_BLC = jnp.where(known_BLH.all(-1, keepdims=True), vectors_BLC, 0.0)
        return map_of_vectors(vectors_BLC, config.pyramid)

    def features(codes_BL: jax.Array) -> jax.Array:
        maps_BHWC = maps(codes_BL)
        return maps_BHWC.reshape(maps_BHWC.shape[0], -1, config.code_channels)

    def decode(codes_BL: jax.Array) -> jax.Array:
        with full_precision(tokenizer.dtype):
            model = tokenizer.model
            return model.apply({"params": params}, maps(codes_BL), method="decode_pixels")[0]

    return [
        Program("encode", "images", "codes", picture, jnp.uint8, encode),
        Program("decode", "codes", "pixels", codes, jnp.int32, decode),
        Program("features", "codes", "features", codes, jnp.int32, features),
    ]


def describe(tokenizer: Tokenizer, batch: int | None) -> dict[str, Any]:
    """Return what a user of the programs has to know, `batch` being None if it is free."""
    side, count = tokenizer.config.image_size, tokenizer.config.length
    size = "B" if batch is None else batch
    return {
        **tokenizer.identity,
        "codes_per_image": count,
        "batch_size": batch,
        "preprocessing": CROP,
        "images": f"uint8 ({size}, {side}, {side}, 3), RGB",
        "codes": f"int32 ({size}, {count}), coarse to fine, row by row; -1 adds nothing",
        "pixels": f"float32 ({size}, {side}, {side}, 3), nominally in [-1, 1], not clamped",
        "features": f"float32 ({size}, {tokenizer.config.scales[-1] ** 2}, "
        f"{tokenizer.config.code_channels})",
    }


def as_text(about: dict[str, Any]) -> dict[str, str]:
    """Return a description with every value as text, JSON for those that are none."""
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
