"""Opens PyTorch's weight files without torch: names and shapes first, data on demand.

A tensor costs memory only while it is used.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence

from tokenflow_jax import files, remote, shipped
from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.weights.formats.safetensors import read_safetensors
from tokenflow_jax.weights.formats.torch_zip import read_zip
from tokenflow_jax.weights.lazy import LazyTensor

_FOLDER_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pth.tar")  # the first found
_INDEX = ".index.json"
WEIGHT_ENDINGS = (*_FOLDER_ENDINGS, _INDEX)
# Parts of keys such as "state.model", and "ema", "state.ema", "model_ema.module".
_RAW, _EMA = re.compile(r"(^|\.)(model|state_dict)(\.|$)"), re.compile(r"(^|[._])ema([._]|$)")


class NoSuchKey(ValueError):
    """A file holds no state_dict under the requested key."""


class StateDict(dict[str, LazyTensor]):
    """The tensors of a checkpoint by name, in the file's order.

    `path` is what was opened and `files` hold them; `prefix` is what a wrapper had put in front of
    every name, removed here.
    """

    def __init__(
        self, tensors: Mapping[str, LazyTensor], files: Sequence[str] = (), path: str = ""
    ):
        self.files, self.path = tuple(files), path or "".join(files[:1])
        # Data-parallel and compiled modules put these in front of every name.
        shared = os.path.commonprefix(list(tensors))  # noqa: RUF071 - by characters
        self.prefix = re.match(r"(module\.|_orig_mod\.)*", shared).group()
        super().__init__({name.removeprefix(self.prefix): t for name, t in tensors.items()})


def open_state_dict(path: str | os.PathLike, key: str | None = None) -> StateDict:
    """Open a PyTorch checkpoint; nothing pickled is executed and no data is loaded yet.

    Args:
      path: a file of any name that holds safetensors, an index of shards, or what `torch.save` or
        `torch.jit.save` wrote; or a folder with one of these.
      key: which state_dict of a file that holds several ("model", "ema", "state.ema", ...).
        None takes "model", else "state_dict", else a bare dict of tensors, else the only one there.

    Raises:
      NoSuchKey: the file has no state_dict under `key`.
      UnsafeCheckpoint: the pickle in the file wants to call something that is no tensor.
      ValueError: no such file, unknown or old format, damaged file.
    """
    path = os.fspath(path)
    return _choose(path, open_state_dicts(path), key)


def open_state_dicts(path: str | os.PathLike) -> dict[str, StateDict]:
    """Open all state_dicts of a checkpoint by dotted key, "" for one without; see above."""
    path = remote.local_copy(shipped.resolved(path))
    if os.path.isdir(path):
        return _open_folder(path)
    if _holds(path) == "index":
        return _open_index(path)
    return _open_file(path)


def find_weights(states: Mapping[str, StateDict]) -> dict[str, StateDict | None]:
    """Return the "raw" weights among state_dicts, and "ema", their moving average: of their names.

    Both may be nested in other dicts.
    """
    nested = [key for key in states if _RAW.search(key) and not _EMA.search(key)]
    usual = [key for key in ("model", "state_dict", "") if key in states]
    raw = states[[*usual, *nested][0]] if usual or len(nested) == 1 else None
    averages = [state for key, state in states.items() if _EMA.search(key)]
    fitting = [state for state in averages if raw is None or state.keys() == raw.keys()]
    return {"raw": raw, "ema": fitting[0] if fitting else states.get("ema")}


def _holds(path: str) -> str:
    """Return what a regular file holds by its first bytes: "zip", "safetensors" or "index".

    Anything else, and a path that is no regular file, is a ValueError that says what it is.
    """
    if not os.path.isfile(path):
        what = "not a regular file" if os.path.exists(path) else "no such file or folder"
        raise ValueError(f"{path}: {what}; give a .safetensors, .pt or .bin file")
    with open(path, "rb") as file:
        start = file.read(512)
    text, problem = start.lstrip().lower(), ""
    if not start:
        problem = "the file is empty; fetch it again"
    elif text.startswith(b"version https://git-lfs"):
        problem = "a pointer of Git LFS instead of the weights; run git lfs pull where it lies"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "a web page instead of the weights; fetch the file behind it"
    elif start[:4] == b"GGUF":
        problem = "a GGUF file, which can only be a language model"
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100 * 2**20:  # its header
        return "safetensors"
    elif text[:1] == b"{":
        return "index"
    elif zipfile.is_zipfile(path):
        return "zip"
    elif path.lower().endswith(".safetensors"):
        return "safetensors"  # damaged: reading says how
    elif start[:1] == b"\x80" or start[257:262] == b"ustar":
        problem = (
            "an old pickle or tar file (torch.save before version 1.6, or no torch file at all), "
            "which is not read. Where it was made: torch.save(torch.load(path, "
            "weights_only=True), new_path), and use new_path"
        )
    else:
        problem = "neither .safetensors nor a zip file of torch.save; damaged or of another kind"
    raise ValueError(f"{path}: {problem}")


def _open_file(path: str) -> dict[str, StateDict]:
    kind = _holds(path)
    if kind == "index":
        raise ValueError(f"{path}: an index of shards, where the weights should be")
    found = {"": read_safetensors(path)} if kind == "safetensors" else read_zip(path)
    return {key: StateDict(tensors, [path]) for key, tensors in found.items()}


def _open_folder(path: str) -> dict[str, StateDict]:
    """Open the one checkpoint of a folder, sharded or not; safetensors first."""
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    for ending in _FOLDER_ENDINGS:
        indices = [name for name in names if name.lower().endswith(ending + _INDEX)]
        found = [name for name in names if name.lower().endswith(ending)]
        several = len(found) > 1 and ending != ".safetensors"
        if len(indices) > 1 or (not indices and several):
            raise ValueError(
                f"{path}: several checkpoints; name one of them:\n{bullets(indices or found)}"
            )
        if indices:
            return _open_index(os.path.join(path, indices[0]))
        if found:
            return _merge(path, [os.path.join(path, name) for name in found])
    raise ValueError(f"{path}: no .safetensors, .bin, .pt or .pth file in this folder")


def _open_index(path: str) -> dict[str, StateDict]:
    """Open the shards that a Hugging Face index names."""
    folder, remedy = os.path.dirname(path) or ".", "; fetch it again"
    weight_map = files.read_json(path, keys=["weight_map"], remedy=remedy)["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"{path}: weight_map does not hold the names of files{remedy}")
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if os.path.basename(name) != name]
    absent = [s for s in shards if s not in outside and not os.path.isfile(f"{folder}/{s}")]
    wrong = [f"{name}: outside the index's folder" for name in outside]
    wrong += [f"{name}: missing" for name in absent] + ([] if shards else ["no shards at all"])
    if wrong:
        raise ValueError(f"{path}: shards to fetch into the index's folder:\n{bullets(wrong)}")
    merged = _merge(path, [os.path.join(folder, name) for name in shards])
    held = {state.prefix + name for state in merged.values() for name in state}
    if lacking := sorted(weight_map.keys() - held):
        raise ValueError(
            f"{path}: the shards do not hold these tensors of the index:\n{bullets(lacking)}"
        )
    return merged


def _merge(path: str, paths: Sequence[str]) -> dict[str, StateDict]:
    """Join shards, each state_dict with those under the same key."""
    shards = [_open_file(file) for file in paths]
    keys = dict.fromkeys(key for shard in shards for key in shard)
    return {key: _join(path, [s[key] for s in shards if key in s]) for key in keys}


def _join(path: str, shards: Sequence[StateDict]) -> StateDict:
    """Join shards of one state_dict; a tensor in two of them is an error."""
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{path}: in more than one file; name one file:\n{bullets(twice)}")
        tensors |= shard
    joined = StateDict(tensors, [file for shard in shards for file in shard.files], path)
    joined.prefix = joined.prefix or shards[0].prefix
    return joined


def _choose(path: str, states: Mapping[str, StateDict], key: str | None) -> StateDict:
    """Return the state_dict of a file under `key`, or the obvious one."""
    named = sorted(name for name in states if name)
    if key is not None:
        if key not in states:
            bare = ", and tensors without a key: leave the key out" if "" in states else ""
            raise NoSuchKey(
                f"{path}: no state_dict under key {key!r}; there are {shown(named) or 'none'}{bare}"
            )
        return states[key]
    found = [states[name] for name in ("model", "state_dict", "") if name in states]
    if found or len(named) == 1:
        return [*found, *states.values()][0]
    if named:
        raise ValueError(
            f"{path}: several state_dicts; choose one with key= from\n{bullets(named)}"
        )
    raise ValueError(
        f"{path}: no tensors by name in this file; save model.state_dict() with torch.save"
    )
