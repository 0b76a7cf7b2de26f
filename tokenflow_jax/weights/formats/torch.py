"""Opens PyTorch's weight files without torch: names and shapes first, data on demand.

A tensor costs memory only while it is used.
"""

import glob
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from tokenflow_jax.weights.formats.safetensors import read_safetensors
from tokenflow_jax.weights.formats.torch_zip import read_zip
from tokenflow_jax.weights.lazy import LazyTensor


class NoSuchKey(ValueError):
    """A file holds no state_dict under the requested key."""


class StateDict(dict[str, LazyTensor]):
    """The tensors of a checkpoint by name, in the file's order.

    `files` hold them; `prefix` is what a wrapper had put in front of every name, removed here.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], files: Sequence[str]):
        self.files = tuple(files)
        # Data-parallel and compiled modules put these in front of every name.
        shared = os.path.commonprefix(list(tensors))  # noqa: RUF071 - by characters
        self.prefix = re.match(r"(module\.|_orig_mod\.)*", shared).group()
        super().__init__({name.removeprefix(self.prefix): t for name, t in tensors.items()})


def open_state_dict(path: str | os.PathLike, key: str | None = None) -> StateDict:
    """Open a PyTorch checkpoint; nothing pickled is executed and no data is loaded yet.

    Args:
      path: a `.safetensors` file, an index (`*.index.json`), a zip file written by `torch.save` or
        `torch.jit.save` (`.pt`, `.pth`, `.bin`), or a folder with one of these.
      key: which state_dict of a file that holds several ("model", "ema", "discriminator", ...).
        None takes "model", else "state_dict", else a bare dict of tensors, else the only one there.

    Raises:
      NoSuchKey: the file has no state_dict under `key`.
      UnsafeCheckpoint: the pickle in the file wants to call something that is no tensor.
      ValueError: no such file, unknown or old format, damaged file.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _open_folder(path, key)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file or folder; give a .safetensors, .pt or .bin file")
    if path.endswith(".index.json"):
        return _open_index(path, key)
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    if zipfile.is_zipfile(path):
        return StateDict(_choose(path, read_zip(path), key), [path])
    with open(path, "rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")  # its length in a .safetensors file
    if path.endswith(".safetensors") or (start[8:] == b"{" and header < 100 * 2**20):
        if key is not None:
            raise NoSuchKey(f"{path}: a .safetensors file has no keys; leave out key={key!r}")
        return StateDict(read_safetensors(path), [path])
    if start[:1] == b"\x80" or tarfile.is_tarfile(path):
        raise ValueError(
            f"{path}: an old pickle or tar file (torch.save before version 1.6, or no torch file "
            "at all), which is not read. Where it was made: torch.save(torch.load(path, "
            "weights_only=True), new_path), and use new_path"
        )
    raise ValueError(
        f"{path}: neither .safetensors nor a zip file of torch.save; the file is damaged or of "
        "another kind"
    )


def _open_folder(path: str, key: str | None) -> StateDict:
    """Open the one checkpoint of a folder, sharded or not; safetensors first."""
    for ending in ("safetensors", "bin", "pt", "pth"):
        indices = sorted(glob.glob(os.path.join(glob.escape(path), f"*.{ending}.index.json")))
        files = sorted(glob.glob(os.path.join(glob.escape(path), f"*.{ending}")))
        if len(indices) > 1 or (not indices and len(files) > 1 and ending != "safetensors"):
            names = [os.path.basename(name) for name in indices or files]
            raise ValueError(f"{path}: several checkpoints {names}; name one of them")
        if indices:
            return _open_index(indices[0], key)
        if files:
            return _merge(path, [open_state_dict(file, key) for file in files])
    raise ValueError(f"{path}: no .safetensors, .bin, .pt or .pth file in this folder")


def _open_index(path: str, key: str | None) -> StateDict:
    """Open the shards that a Hugging Face index names."""
    folder = os.path.dirname(path)
    with open(path, encoding="utf-8") as file:
        try:
            weight_map = dict(json.load(file)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not an index of shards ({error!r}); fetch it again"
            ) from None
    shards = sorted(set(weight_map.values()))
    outside = [s for s in shards if not isinstance(s, str) or os.path.basename(s) != s]
    absent = [s for s in shards if s not in outside and not os.path.isfile(os.path.join(folder, s))]
    if outside or absent:
        raise ValueError(
            f"{path}: shards outside this folder: {outside or 'none'}; shards that are missing: "
            f"{absent or 'none'}; fetch the missing files into the index's folder"
        )
    merged = _merge(path, [open_state_dict(os.path.join(folder, s), key) for s in shards])
    lacking = sorted(name for name in weight_map if name not in merged)
    if lacking and not merged.prefix:
        raise ValueError(f"{path}: the shards do not hold these tensors of the index: {lacking}")
    return merged


def _merge(path: str, shards: Sequence[StateDict]) -> StateDict:
    """Join shards; a tensor in two of them is an error."""
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise ValueError(f"{path}: in more than one file: {twice}; name one file")
        tensors |= shard
    return StateDict(tensors, [file for shard in shards for file in shard.files])


def _choose(path: str, root: dict[str, Any], key: str | None) -> dict[str, LazyTensor]:
    """Return the state_dict of a file under `key`, or the obvious one."""
    groups = {name: value for name, value in root.items() if isinstance(value, dict) and value}
    bare = {name: value for name, value in root.items() if isinstance(value, LazyTensor)}
    if key is not None:
        if key not in groups:
            raise NoSuchKey(
                f"{path}: no state_dict under key {key!r}; there are {sorted(groups) or 'none'}"
                + (", and tensors without a key: leave the key out" if bare else "")
            )
        return groups[key]
    found = [groups[name] for name in ("model", "state_dict") if name in groups]
    found += [bare] if bare else []
    if found or len(groups) == 1:
        return [*found, *groups.values()][0]
    if groups:
        raise ValueError(f"{path}: several state_dicts; choose one with key= from {sorted(groups)}")
    raise ValueError(
        f"{path}: no tensors by name in this file; save model.state_dict() with torch.save"
    )
