"""A hash of everything in a tokenizer that decides on codes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenflow_jax.tokenizer.kinds import PAPER
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.weights.lazy import data, in_memory

# What decides on codes: hyper-parameters, and top-level parts of the weights. The decoders do not,
# so a finer decoder reads the codes of its predecessor.
_FIELDS = ("image_size", "scales", "pixel_weight", "semantic_encoder", "pixel_image_size")
_PARTS = (
    "semantic_encoder", "semantic_in_1", "semantic_in_2", "pixel_encoder", "pixel_in",
    "semantic_codebook", "pixel_codebook",
)  # fmt: skip


def fingerprint(config: TokenizerConfig, arrays: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that two tokenizers share if they give the same codes.

    `arrays` are the parameters by path; lazy ones are read one at a time.
    """
    fields = {name: getattr(config, name) for name in _FIELDS}
    arrays = {name: in_memory(name, array) for name, array in arrays.items()}
    arrays = config.quantizer.finish(arrays, config.pixel_channels)
    if (quantizer := config.quantizer.finished) != PAPER:
        fields["quantizer"] = dataclasses.asdict(quantizer)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        if name.split("/")[0] in _PARTS:
            array = np.ascontiguousarray(data(array), np.float32)
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]


def identity(config: TokenizerConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record that data sets of codes and models trained on codes keep of a tokenizer."""
    return {
        "fingerprint": fingerprint(config, arrays),
        "codebook_size": config.codes,
        "scales": list(config.scales),
        "image_size": config.image_size,
    }
