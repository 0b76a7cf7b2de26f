"""Folders of `save_pretrained`: weights, config.json, a model card and the tokenizers."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from tokenflow_jax import files
from tokenflow_jax.weights import record
from tokenflow_jax.weights.card import Trained, write_card
from tokenflow_jax.weights.folder import SHARD_BYTES, write_json, write_shards
from tokenflow_jax.weights.lazy import in_memory
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import flatten, torch_tensors


def save_folder(
    path: str | os.PathLike,
    part: Part,
    config: Any,
    params: Mapping[str, Any],
    more: Mapping[str, Any],
    rows: Mapping[str, Any],
    trained: Trained,
    *,
    parts: Mapping[str, Callable[[pathlib.Path], None]] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder that is complete in itself; it appears when all of it is written.

    Args:
      more: what config.json says besides the stage and the model, such as the tokenizers.
      rows: what the card's table of the model says besides the number of parameters.
      parts: name -> what writes the subfolder of that name.
    """
    facts, pictures = trained.facts(), trained.pictures()
    about = record.make_record(part.stage, config, {}, {**more, "training": facts})
    arrays = {name: in_memory(name, array) for name, array in flatten(params).items()}
    tensors = torch_tensors(arrays, part.table(config))
    tensors |= {name: in_memory(name, array) for name, array in part.buffers(config).items()}
    with files.write_atomically(path, overwrite) as partial:
        partial.mkdir(parents=True)
        text = record.to_text(about)
        write_shards(partial, tensors, shard_bytes, {record.KEY: text})
        write_json(partial / record.CONFIG, {record.KEY: json.loads(text)})
        for name, write in (parts or {}).items():
            write(partial / name)
        for name, picture in pictures.items():
            (partial / "images").mkdir(exist_ok=True)
            (partial / "images" / f"{name}.png").write_bytes(picture.read_bytes())
        name = os.path.basename(os.path.normpath(path))
        rows = {"parameters": sum(array.size for array in flatten(params).values()), **rows}
        shown = [f"images/{name}.png" for name in pictures]
        text = write_card(part.stage, name, rows, facts, shown)
        (partial / "README.md").write_text(text, encoding="utf-8")
