"""Checkpoints: training state + data iterator + config, complete or absent, never half.

A checkpoint is the directory `<workdir>/checkpoints/<step>` with two items:
  state   the arrays, as Orbax writes them;
  info    JSON: the config, every process's position in the training data, and name, shape, dtype
          and checksum of every array.
Orbax renames the directory into place when all is written, so a killed process leaves only a
temporary one, which the next start removes. The checksums are there because nothing in Orbax
notices a damaged byte.

Nothing in a checkpoint depends on how many devices or processes wrote it: it is restored onto any
mesh and into any number of processes.
"""

import fcntl
import json
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from tokenflow_jax import files
from tokenflow_jax.train import checksums
from tokenflow_jax.train.renamed import upgrade

FORMAT = 2
_MAX_LINES = 20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not fit the run that wants to continue from it."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | epath.Path, keep: int = 2, asynchronous: bool | None = None):
        """Opens (or creates) `<workdir>/checkpoints` and removes what a killed save left behind.

        Args:
          workdir: the run's directory.
          keep: how many of the latest checkpoints stay.
          asynchronous: write in the background. By default on accelerators only: on CPU the host
            copy would be the very buffer that the next step overwrites.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1")
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            # Orbax's own cleaning overlooks a directory that it was killed right after making.
            _remove_unfinished(self.directory)
        if asynchronous is None:
            asynchronous = jax.default_backend() != "cpu"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep)]),
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Returns the directory of a checkpoint."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, data: Any, config: Mapping[str, Any]) -> None:
        """Saves a checkpoint; returns when the state may be overwritten.

        Args:
          step: the number of finished steps, which names the checkpoint.
          state: a pytree of arrays.
          data: an object with `get_state()`: this process's position in the training data, as
            JSON-able values.
          config: JSON-able config (see config_to_dict).

        Raises:
          CheckpointError: the disk is full or not writable; earlier checkpoints are intact.
        """
        info = {
            "format": FORMAT,
            "config": dict(config),
            "process_count": jax.process_count(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "data": _of_all_processes(data.get_state()),
            "arrays": describe_arrays(state, with_sums=True),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            self._raise_write_error(step, error)

    def wait(self) -> None:
        """Waits until a save in the background is complete; raises as `save` does."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            self._raise_write_error(None, error)

    def close(self) -> None:
        """Waits for pending work and releases the manager's threads; raises as `save` does."""
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            self._raise_write_error(None, error)

    def reached_preemption(self, step: int) -> bool:
        """Whether any process of a multi-process run was told to end (needs jax.distributed)."""
        return self._manager.reached_preemption(step)

    def read_info(self, step: int) -> dict[str, Any]:
        """Returns the info item of a checkpoint.

        Raises:
          CheckpointError: it is not a checkpoint of this project, or one of a newer format.
        """
        return read_info(self.path(step))

    def restore(self, step: int, like: Any, data: Any) -> Any:
        """Restores the state onto the shardings of `like`, and the position in the data.

        Args:
          step: which checkpoint.
          like: pytree of arrays or jax.ShapeDtypeStruct with shardings; only shapes are used.
          data: an object with `set_state(positions)`, which gets those of all processes that saved.

        Returns:
          The state, with the structure of `like`.

        Raises:
          CheckpointError: arrays are absent, left over, or of another shape or dtype (all of them
            are listed); damaged bytes; a position in other data.
        """
        info = self.read_info(step)
        problems = compare_arrays(info["arrays"], describe_arrays(like))
        if problems:
            raise CheckpointError(
                f"checkpoint {self.path(step)} does not fit this run:\n"
                + _bullets(problems)
                + "\nUse the config of the checkpoint, or another --workdir."
            )
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
            )
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"checkpoint {self.path(step)} cannot be read, it may be damaged ({reason})"
                + _before(self.path(step))
            ) from error
        check_checksums(info["arrays"], restored.state, self.path(step))
        try:
            data.set_state(info["data"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.path(step)}: {error}") from error
        return restored.state

    def _raise_write_error(self, step: int | None, error: Exception) -> None:
        """Raises an I/O failure as a CheckpointError, and any other error as it is."""
        full = files.full_disk(error)
        if full is None and not isinstance(error, OSError):
            raise error
        name = "a checkpoint" if step is None else f"checkpoint {self.path(step)}"
        last = self._last_complete(step)
        intact = f"; the last complete one is {last}" if last else ""
        reason = full or " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} could not be written ({reason}){intact}. Free some space (or correct the "
            f"permissions), or lower --config.keep_checkpoints, then run the same command again."
        ) from error

    def _last_complete(self, failed: int | None) -> epath.Path | None:
        """The newest finished checkpoint on disk: the manager also lists the one that failed."""
        steps = [
            int(p.name)
            for p in self.directory.iterdir()
            if p.name.isdigit() and int(p.name) != failed and (p / "info").exists()
        ]
        return self.path(max(steps)) if steps else None


class WorkdirLock:
    """Keeps two runs from writing to one workdir; the kernel drops it if the process is killed."""

    def __init__(self, workdir: str | epath.Path):
        self._path = epath.Path(workdir) / ".lock"
        self._file = None

    def __enter__(self) -> "WorkdirLock":
        # Object stores have no locks; of several processes of one run the first one locks.
        if "://" in str(self._path) or jax.process_index() != 0:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise CheckpointError(
                f"another run is writing to {self._path.parent}; wait for it to end, or give "
                f"another --workdir"
            ) from error
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._file is not None:
            self._file.close()


def config_to_dict(config: Any) -> dict[str, Any]:
    """Turns a ConfigDict into plain JSON values (tuples become lists)."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(plain, default=str, sort_keys=True))


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns dotted key -> (old value, new value) for all that differs; absent values are None."""
    old_flat, new_flat = _flatten(old), _flatten(new)
    return {
        key: (old_flat.get(key), new_flat.get(key))
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key)
    }


def describe_arrays(tree: Any, with_sums: bool = False) -> dict[str, dict[str, Any]]:
    """Lists the arrays of a pytree: path -> shape, dtype and, if asked, checksum.

    Args:
      tree: arrays or anything with shape and dtype.
      with_sums: also read the arrays (see `checksums`), in all processes together.
    """
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    described = {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
        }
        for path, leaf in named
    }
    if with_sums:
        sums = checksums.sums_of([leaf for _, leaf in named])
        for entry, value in zip(described.values(), sums, strict=True):
            entry["sum32"] = value
    return described


def compare_arrays(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns one line per array that is absent, left over, or of another shape or dtype."""

    def text(entry: Mapping[str, Any]) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    problems = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            problems.append(f"{name} {text(saved[name])} is only in the checkpoint")
        elif name not in saved:
            problems.append(f"{name} {text(wanted[name])} is not in the checkpoint")
        elif text(saved[name]) != text(wanted[name]):
            problems.append(
                f"{name} is {text(saved[name])} in the checkpoint and {text(wanted[name])} here"
            )
    return problems


def check_checksums(saved: Mapping[str, Any], tree: Any, path: epath.Path) -> None:
    """Raises CheckpointError naming the restored arrays whose bytes are not those saved.

    Args:
      saved: the `arrays` of the info item.
      tree: the restored arrays.
      path: the checkpoint, for the message.
    """
    found = describe_arrays(tree, with_sums=True)
    damaged = [name for name, entry in found.items() if entry["sum32"] != saved[name]["sum32"]]
    if damaged:
        raise CheckpointError(
            f"checkpoint {path} is damaged on disk; the bytes differ from those saved in:\n"
            + _bullets(damaged)
            + _before(path)
        )


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes what killed or failed saves left in the folder of the checkpoints."""
    for left in list(directory.glob("*.orbax-checkpoint-tmp*")):
        try:
            files.remove(left)
        except OSError as error:
            raise CheckpointError(
                f"the unfinished checkpoint {left} cannot be removed ({error.strerror}); end "
                f"whatever writes there or correct the permissions, then run the same command again"
            ) from error


def _before(path: epath.Path) -> str:
    """What to do about a damaged checkpoint."""
    steps = [
        int(p.name)
        for p in path.parent.iterdir()
        if p.name.isdigit() and p.name != path.name and (p / "info").exists()
    ]
    earlier = [step for step in steps if path.name.isdigit() and step < int(path.name)]
    if not earlier:
        return "\nThere is no earlier checkpoint beside it; use a copy, or begin another --workdir."
    return (
        f"\nThe checkpoint before it is {path.parent / str(max(earlier))}: remove {path} and run "
        "the same command again to continue from there."
    )


def _of_all_processes(value: Any) -> list[Any]:
    """The JSON-able values of all processes, by process, in each of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.pad(text, (0, int(lengths.max()) - text.size))
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:length].tobytes())
        for row, length in zip(texts, lengths.reshape(-1), strict=True)
    ]


def find_checkpoint(path: str | epath.Path, step: int | None = None) -> epath.Path:
    """Finds a checkpoint directory from a workdir, its `checkpoints` folder, or itself.

    Args:
      path: any of the three.
      step: which step; the newest when None.

    Raises:
      CheckpointError: there is none.
    """
    path = epath.Path(path).absolute()
    if (path / "info").exists() and (path / "state").exists():
        if step is not None and str(step) != path.name:
            raise CheckpointError(f"{path} is the checkpoint of one step, but step={step} is asked")
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = []
    if root.exists():
        # The item directories tell a finished checkpoint from any other folder with digits.
        steps = sorted(
            int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "info").exists()
        )
    if not steps or (step is not None and step not in steps):
        have = f"has the steps {steps}" if steps else "holds no checkpoint"
        asked = "" if step is None else f" (step {step} was asked for)"
        raise CheckpointError(
            f"{path} {have}{asked}; give a workdir of tokenflow_jax.main, or one of the "
            f"directories <workdir>/checkpoints/<step>"
        )
    return root / str(steps[-1] if step is None else step)


def read_info(path: epath.Path) -> dict[str, Any]:
    """Returns the info item of a checkpoint directory.

    Raises:
      CheckpointError: it is not a checkpoint of this project, or one of a newer format.
    """
    file = path / "info" / "metadata"
    if not file.exists():
        raise CheckpointError(f"{path} was not written by tokenflow_jax (no info item)")
    try:
        info = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged ({error}); remove {path}") from error
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {info.get('format')}, this version reads {FORMAT}; use the "
            f"version of tokenflow_jax that wrote it"
        )
    return info | {"config": upgrade(info["config"])}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _bullets(lines: list[str]) -> str:
    shown = [f"  - {line}" for line in lines[:_MAX_LINES]]
    if len(lines) > _MAX_LINES:
        shown.append(f"  - and {len(lines) - _MAX_LINES} more")
    return "\n".join(shown)
