"""Checkpoints: training state, data position and config; complete or absent, never half.

A checkpoint is the directory `<workdir>/checkpoints/<step>` with two items:
  state   the arrays, as Orbax writes them;
  info    JSON: the config, every process's position in the training data, and name, shape, dtype
          and checksum of every array.
Orbax renames the directory into place when all is written, so a killed process leaves only a
temporary one, which the next start removes. The checksums are ours: nothing in Orbax notices a
damaged byte.

Nothing in a checkpoint depends on how many devices or processes wrote it: it is restored onto any
mesh and into any number of processes.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from tokenflow_jax import files
from tokenflow_jax.train.checksums import compare_arrays, describe_arrays
from tokenflow_jax.train.run_config import upgrade

FORMAT = 2
_MAX_LINES = 20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not fit the run that wants to continue from it."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | epath.Path, keep: int = 2):
        """Open (or create) `<workdir>/checkpoints` and remove what a killed save left behind.

        The latest `keep` checkpoints stay. On accelerators writing is asynchronous.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1")
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            # Orbax's own cleaning overlooks a directory that it was killed right after making.
            _remove_unfinished(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep)]),
                # On CPU the host copy is the buffer that the next step overwrites.
                enable_async_checkpointing=jax.default_backend() != "cpu",
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def save(self, step: int, state: Any, data: Any, config: Mapping[str, Any]) -> None:
        """Save a checkpoint named by its step; return when the state may be overwritten.

        `data.get_state()` is this process's position in the data. Raises CheckpointError if the
        disk is full or not writable; earlier checkpoints are intact.
        """
        info = {
            "format": FORMAT,
            "config": dict(config),
            "process_count": jax.process_count(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "data": _of_all_processes(data.get_state()),
            "arrays": describe_arrays(state, with_sums=True),
        }
        items = {"state": ocp.args.StandardSave(state), "info": ocp.args.JsonSave(info)}
        with self._explained_write_errors(step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until a save in the background is complete; raise as `save` does."""
        with self._explained_write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending work and release the manager's threads; raise as `save` does."""
        with self._explained_write_errors():
            self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Tell whether any process of the run was told to end (needs jax.distributed)."""
        return self._manager.reached_preemption(step)

    def read_info(self, step: int) -> dict[str, Any]:
        """Return the info item of a checkpoint; raise as the function `read_info` does."""
        return read_info(self.path(step))

    def restore(self, step: int, like: Any, data: Any) -> Any:
        """Restore the state onto the shardings of `like`, and the position in the data.

        `data.set_state` gets the positions of all processes that saved. Raises CheckpointError for
        arrays that are absent, left over, or of another shape or dtype (all are listed), for
        damaged bytes, and for a position in other data.
        """
        info = self.read_info(step)
        problems = compare_arrays(info["arrays"], describe_arrays(like))
        if problems:
            raise CheckpointError(
                f"checkpoint {self.path(step)} does not fit this run:\n"
                + _bullets(problems)
                + "\nUse the config of the checkpoint, or another --workdir."
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            restored = self._manager.restore(step, args=items)
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

    @contextlib.contextmanager
    def _explained_write_errors(self, step: int | None = None) -> Iterator[None]:
        """Raise I/O failures in the block as CheckpointErrors, and any other error as it is."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            full = files.full_disk(error)
            if full is None and not isinstance(error, OSError):
                raise
            name = "a checkpoint" if step is None else f"checkpoint {self.path(step)}"
            # The manager also lists the one that failed.
            complete = [other for other in _complete_steps(self.directory) if other != step]
            intact = f"; the last complete one is {self.path(complete[-1])}" if complete else ""
            reason = full or " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{name} could not be written ({reason}){intact}. Free some space (or correct "
                "the permissions), or lower --config.keep_checkpoints, then run the same command "
                "again."
            ) from error


@contextlib.contextmanager
def lock(workdir: str | epath.Path) -> Iterator[None]:
    """Keep two runs from writing to one workdir; the kernel drops the lock of a killed process."""
    # Object stores have no locks; of several processes of one run the first one locks.
    if "://" in str(workdir) or jax.process_index() != 0:
        yield
        return
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is writing to {workdir}; wait for it to end, or give "
                f"another --workdir"
            ) from error
        yield


def check_checksums(saved: Mapping[str, Any], tree: Any, path: epath.Path) -> None:
    """Raise CheckpointError that names the restored arrays whose bytes are not those saved."""
    found = describe_arrays(tree, with_sums=True)
    damaged = [name for name, entry in found.items() if entry["sum32"] != saved[name]["sum32"]]
    if damaged:
        raise CheckpointError(
            f"checkpoint {path} is damaged on disk; the bytes differ from those saved in:\n"
            + _bullets(damaged)
            + _before(path)
        )


def _remove_unfinished(directory: epath.Path) -> None:
    """Remove what killed or failed saves left in the checkpoints directory."""
    for left in list(directory.glob("*.orbax-checkpoint-tmp*")):
        try:
            files.remove(left)
        except OSError as error:
            raise CheckpointError(
                f"the unfinished checkpoint {left} cannot be removed ({error.strerror}); end "
                f"whatever writes there or correct the permissions, then run the same command again"
            ) from error


def _before(path: epath.Path) -> str:
    """Say what to do about a damaged checkpoint."""
    steps = _complete_steps(path.parent) if path.name.isdigit() else []
    earlier = [step for step in steps if step < int(path.name)]
    if not earlier:
        return "\nThere is no earlier checkpoint beside it; use a copy, or begin another --workdir."
    return (
        f"\nThe checkpoint before it is {path.parent / str(earlier[-1])}: remove {path} and run "
        "the same command again to continue from there."
    )


def _complete_steps(root: epath.Path) -> list[int]:
    """Return the steps of the finished checkpoints in a directory, the newest last."""
    # The item directories tell a finished checkpoint from any other folder with digits.
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "info").exists())


def _of_all_processes(value: Any) -> list[Any]:
    """Gather a JSON-able value of each process in all of them."""
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
    """Find the checkpoint of a step, or the newest, from a workdir, its `checkpoints` or itself."""
    path = epath.Path(path).absolute()
    if (path / "info").exists() and (path / "state").exists():
        if step is not None and str(step) != path.name:
            raise CheckpointError(f"{path} is the checkpoint of one step, but step={step} is asked")
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = _complete_steps(root) if root.exists() else []
    if not steps or (step is not None and step not in steps):
        have = f"has the steps {steps}" if steps else "holds no checkpoint"
        asked = "" if step is None else f" (step {step} was asked for)"
        raise CheckpointError(
            f"{path} {have}{asked}; give a workdir of tokenflow_jax.main, or one of the "
            f"directories <workdir>/checkpoints/<step>"
        )
    return root / str(steps[-1] if step is None else step)


def read_info(path: epath.Path) -> dict[str, Any]:
    """Return the info item of a checkpoint directory, its config under today's keys.

    Raises CheckpointError for another project's checkpoint or another format.
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


def _bullets(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "\n".join(f"  - {line}" for line in lines[:_MAX_LINES] + more)
