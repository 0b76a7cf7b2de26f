"""The info item of a checkpoint, and which directories are complete checkpoints.

`info/metadata` is one JSON object: "format", "config", what else its writer notes, "arrays" (name,
shape, dtype and checksum of every array), and "crc32", the checksum of all the rest.
"""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from tokenflow_jax import files, remote, shipped
from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.train.run_config import upgrade, wrong_types

FORMAT = 3
_UNSEALED = 2  # has no "crc32"; read, but not written
_STEP = re.compile("0|[1-9][0-9]*")
_MARK = "commit_success.txt"  # Orbax's last file in a bucket, where it cannot rename a folder


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not fit the run that wants to continue from it."""


def seal(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return an info item as it will be read back, with its format and checksum."""
    info = json.loads(json.dumps({"format": FORMAT, **info}))
    return {**info, "crc32": _crc32(info)}


def _crc32(info: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def read_info(path: epath.Path) -> dict[str, Any]:
    """Return the info item of a checkpoint directory, its config under today's keys.

    Raises CheckpointError for a damaged one, another project's checkpoint or another format.
    """
    file = path / "info" / "metadata"
    if not file.exists():
        raise CheckpointError(
            f"{path} is no complete checkpoint of tokenflow_jax (no info item)" + what_to_do(path)
        )
    try:
        info = files.read_json(file, keys=("format",))
    except ValueError as error:
        raise CheckpointError(f"checkpoint is damaged: {error}" + what_to_do(path)) from None
    crc32, known = info.pop("crc32", None), (_UNSEALED, FORMAT)
    if crc32 is None and info["format"] not in known:
        raise CheckpointError(
            f"{path} has format {shown(info['format'])}, this version reads {known}; use the "
            f"version of tokenflow_jax that wrote it"
        )
    # One changed bit may turn a format into the other, or hide the checksum, but not both.
    unsealed = crc32 is None and info["format"] == _UNSEALED
    if not unsealed and crc32 != _crc32(info):
        raise CheckpointError(
            f"{file} is damaged: its content is not what was saved" + what_to_do(path)
        )
    arrays = info.get("arrays")
    if not isinstance(arrays, dict) or not all(map(_is_described, arrays.values())):
        raise CheckpointError(f"{file} does not describe arrays" + what_to_do(path))
    if not isinstance(info.get("config"), dict):
        raise CheckpointError(f"{file} has no config" + what_to_do(path))
    config = upgrade(info["config"])
    if wrong := wrong_types(config):
        raise CheckpointError(f"{file} is not of a training run:\n{bullets(wrong)}")
    return info | {"config": config}


def _is_described(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(shape := entry.get("shape"), list):
        return False
    sizes = all(type(size) is int and size >= 0 for size in shape)
    return sizes and isinstance(entry.get("dtype"), str) and type(entry.get("sum32")) is int


def complete_steps(root: epath.Path) -> list[int]:
    """Return the steps of the finished checkpoints in a directory, the newest last."""
    return [step for step in _steps(root) if _is_complete(root / str(step))]


def _is_complete(path: epath.Path) -> bool:
    both = (path / "info").exists() and (path / "state").exists()
    if not both or not remote.is_remote(path) or not _STEP.fullmatch(path.name):
        return both
    return (path / _MARK).exists() or _was_copied(path)


def _was_copied(path: epath.Path) -> bool:
    """Return True for a checkpoint in a bucket that was finished somewhere else, on a disk."""
    try:
        about = files.read_json(path / "_CHECKPOINT_METADATA")
    except ValueError:
        return False
    return not (path / _MARK).exists() and bool(about.get("commit_timestamp_nsecs"))


def mark_copies(root: epath.Path) -> None:
    """Mark checkpoints that were copied into a bucket as finished: Orbax removes others there."""
    for step in _steps(root):
        if _was_copied(path := root / str(step)):
            for part in (path / "info", path / "state", path):
                (part / _MARK).write_text("copied")


def _steps(root: epath.Path) -> list[int]:
    # A copy of a checkpoint may have any name, and other names may look like numbers.
    entries = root.iterdir() if root.exists() else ()  # object stores have no empty folders
    return sorted(int(p.name) for p in entries if _STEP.fullmatch(p.name) and p.is_dir())


def check_newest(root: epath.Path) -> None:
    """Raise CheckpointError if the newest checkpoint lacks a part: Orbax would go on from it."""
    steps = _steps(root)
    path = root / str(steps[-1]) if steps else None
    if path and remote.is_remote(path) and not (path / _MARK).exists():
        return  # a killed save, which Orbax removes
    if path and not _is_complete(path):
        raise CheckpointError(f"{path} is no complete checkpoint" + what_to_do(path))


def what_to_do(path: epath.Path) -> str:
    """Say what to do about a damaged checkpoint."""
    steps = complete_steps(path.parent) if _STEP.fullmatch(path.name) else []
    earlier = [step for step in steps if step < int(path.name)]
    if not earlier:
        return (
            "\nThere is no earlier checkpoint beside it; use a copy, or remove it to start anew, "
            "or begin another --workdir."
        )
    return (
        f"\nThe checkpoint before it is {path.parent / str(earlier[-1])}: remove {path} and run "
        "the same command again to continue from there."
    )


def find_checkpoint(path: str | epath.Path, step: int | None = None) -> epath.Path:
    """Find the checkpoint of a step, or the newest, from a workdir, its `checkpoints` or itself."""
    path = files.absolute(path)
    if _is_complete(path):
        if step is not None and str(step) != path.name:
            raise CheckpointError(f"{path} is the checkpoint of one step, but step={step} is asked")
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = complete_steps(root) if root.is_dir() else []
    if not steps or (step is not None and step not in steps):
        have = f"has the steps {steps}" if steps else "holds no checkpoint"
        asked = "" if step is None else f" (step {step} was asked for)"
        raise CheckpointError(
            f"{path} {have}{asked}; give a workdir of tokenflow_jax.main, one of the directories "
            "<workdir>/checkpoints/<step>, or the name of a model that comes with the package: "
            f"{', '.join(shipped.names())}"
        )
    return root / str(steps[-1] if step is None else step)
