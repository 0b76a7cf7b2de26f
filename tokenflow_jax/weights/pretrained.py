"""Folders of `save_pretrained`: weights, config.json, a model card and the tokenizers."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from tokenflow_jax import files, hub
from tokenflow_jax.weights import record
from tokenflow_jax.weights.card import Trained, write_card
from tokenflow_jax.weights.folder import SHARD_BYTES, write_json, write_shards
from tokenflow_jax.weights.lazy import in_memory
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import flatten, torch_tensors


class Pretrained:
    """Folders and hub repositories of a model whose `_save` writes the folder."""

    def save_pretrained(
        self, folder: str | os.PathLike, *, name: str = "", overwrite: bool = False
    ) -> None:
        """Write a folder for `load`: weights, config.json, a model card, and the tokenizers.

        Args:
          folder: local or remote (gs://); complete in itself, so that it can be moved.
          name: of the model in its card, the folder's by default.
          overwrite: replace what is there.

        Raises:
          OSError: the folder exists and `overwrite` is false, or it cannot be written.
        """
        self._save(folder, name=name, overwrite=overwrite)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes as the model OWNER/NAME; return the commit's URL.

        Raises:
          OSError: the hub cannot be reached, or refuses: log in with its own command.
        """
        repo = repo.removeprefix("hf://")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(os.path.join(folder, "model"), name=f"hf://{repo}")
            return hub.push(os.path.join(folder, "model"), repo, private=private)


def save_folder(
    path: str | os.PathLike,
    part: Part,
    config: Any,
    params: Mapping[str, Any],
    more: Mapping[str, Any],
    rows: Mapping[str, Any],
    trained: Trained,
    *,
    name: str = "",
    parts: Mapping[str, Callable[[pathlib.Path], None]] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder that is complete in itself; it appears when all of it is written.

    Args:
      more: what config.json says besides the stage and the model, such as the tokenizers.
      rows: what the card's table of the model says besides the number of parameters.
      name: of the model in its card, the folder's by default.
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
        for part_name, write in (parts or {}).items():
            write(partial / part_name)
        for grid, picture in pictures.items():
            (partial / "images").mkdir(exist_ok=True)
            (partial / "images" / f"{grid}.png").write_bytes(picture.read_bytes())
        name = name or os.path.basename(os.path.normpath(path))
        rows = {"parameters": sum(array.size for array in flatten(params).values()), **rows}
        shown = [f"images/{grid}.png" for grid in pictures]
        text = write_card(part.stage, name, rows, facts, shown)
        (partial / "README.md").write_text(text, encoding="utf-8")
