"""The record that files of ours in other formats hold of their model, so that no variant is needed.

It is a JSON object: "stage", "model" (the hyper-parameters), and what programs read of a training
run's config. A .safetensors file has it in its metadata, a .pt file beside "model", a folder in
config.json, each under the name of this package.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

import tokenflow_jax
from tokenflow_jax import files, remote, shipped
from tokenflow_jax.messages import shown
from tokenflow_jax.train.run_config import wrong_types
from tokenflow_jax.weights.formats.safetensors import read_metadata
from tokenflow_jax.weights.formats.torch import open_state_dicts

KEY, CONFIG = "tokenflow_jax", "config.json"
_MOST = 2**20  # bytes
_KEPT = ("tokenizer", "text_tokenizer", "sampling")
_KEPT_DATA = ("max_length", "template", "own_system", "system", "image_mode")


def make_record(
    stage: str, model: Any, saved: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a record; `saved` is a training run's config, `more` replaces or adds entries."""
    kept = {name: saved[name] for name in _KEPT if name in saved}
    data = {name: value for name, value in saved.get("data", {}).items() if name in _KEPT_DATA}
    kept |= {"data": data} if data else {}
    return {"stage": stage, "model": dataclasses.asdict(model), **kept, **(more or {})}


def to_text(record: Mapping[str, Any]) -> str:
    """Return a record as JSON, with the version of the package, without paths of this machine."""
    record = {**record, "version": tokenflow_jax.__version__}
    if isinstance(tokenizer := record.get("tokenizer"), dict):
        record["tokenizer"] = {k: v for k, v in tokenizer.items() if k != "absolute_path"}
    return json.dumps(record)


def to_array(record: Mapping[str, Any]) -> np.ndarray:
    """Return a record as the bytes of its JSON."""
    return np.frombuffer(to_text(record).encode(), np.uint8)


def part_in(path: str | os.PathLike, stage: str) -> str:
    """Return a path as `settled`; of a folder with a model of that stage inside, that one's."""
    path = remote.settled(shipped.resolved(path))
    inside = remote.join(path, stage)
    has_it = path and remote.kind_of(remote.join(inside, CONFIG)) == "file"
    return inside if has_it else path


def read_record(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the record of a file, a folder or an index of shards; None if it has none.

    Raises:
      ValueError: there is one, and it is damaged.
    """
    path = shipped.resolved(path)
    path = remote.local_copy(path) if remote.kind_of(path) else os.fspath(path)
    if os.path.isfile(file := os.path.join(path, CONFIG)):
        record = files.read_json(file, remedy="; fetch it again").get(KEY)
        if record is not None:
            return _checked(record, file)
    try:
        states = open_state_dicts(path)
        own = states.pop(KEY, {}).get("record")
        if own is not None:
            text = own.read().tobytes() if own.nbytes <= _MOST else bytes(_MOST + 1)
        else:
            first = next(file for state in states.values() for file in state.files)
            text = read_metadata(first).get(KEY, "").encode()
    except (ValueError, StopIteration):  # opening it as weights says what is wrong
        return None
    where = f"{path}: what it records of its model"
    if len(text) > _MOST:
        raise ValueError(f"{where} has more than the {_MOST:,} bytes that are read")
    return _checked(files.parse_json(text, where), where) if text else None


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Return a record that has what programs read of it."""
    kinds = {"stage": str, "model": dict}
    if not isinstance(record, dict):
        wrong = [f"it is {shown(record)}"]
    else:
        wrong = [f"it lacks {k!r}" for k, kind in kinds.items() if type(record.get(k)) is not kind]
        wrong += wrong_types(record)
    if wrong:
        raise ValueError(f"{where} is damaged ({'; '.join(wrong)}); write the file again")
    return record
