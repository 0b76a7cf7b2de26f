"""Folders in Hugging Face's format: config.json and .safetensors, one file or indexed shards."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tokenflow_jax import files, remote
from tokenflow_jax.messages import bullets
from tokenflow_jax.weights.conversion import Written, cast, different_shapes
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.lazy import in_memory, watched
from tokenflow_jax.weights.rules import RuleTable, Tensors, flatten, torch_tensors

SHARD_BYTES = 5 * 10**9


def read_fields(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Return the fields of the config.json in a folder or beside a file, and its path."""
    folder = path if remote.kind_of(path) == "folder" else os.path.dirname(path)
    file = remote.join(folder, "config.json")
    if not remote.kind_of(file):
        raise ValueError(
            f"{file} is missing; give a folder in Hugging Face's format, with config.json and "
            ".safetensors files"
        )
    return files.read_json(file, remedy="; fetch it again"), file


def write_folder(
    path: str | os.PathLike,
    fields: Mapping[str, Any],
    params: Mapping[str, Any],
    table: RuleTable,
    template: Mapping[str, Any],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Written:
    """Write config.json and weights; the folder appears when it is complete.

    `params` are nested or by path, lazy or not; ValueError unless `template` has their shapes.
    A `dtype` of None keeps theirs. Weights beyond `shard_bytes` are split over several files.
    """
    arrays = {name: in_memory(name, array) for name, array in flatten(params).items()}
    wrong = different_shapes(arrays, template)
    if wrong:
        raise ValueError(f"these parameters are not the config's:\n{bullets(wrong)}")
    tensors = {name: cast(t, dtype) for name, t in torch_tensors(arrays, table).items()}
    fields = {**fields, "torch_dtype": str(tensors["model.embed_tokens.weight"].dtype)}
    with files.write_atomically(path, overwrite) as partial:
        partial.mkdir(parents=True)
        write_json(partial / "config.json", fields)
        write_shards(partial, watched(tensors), shard_bytes)
    return Written("raw", len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def write_shards(
    folder: pathlib.Path,
    tensors: Tensors,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, or several with Hugging Face's index, each with the same metadata."""
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], metadata)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
