"""Checkpoints: training state, data position and config; complete or absent, never half.

A checkpoint is the directory `<workdir>/checkpoints/<step>` with two items:
  state   the arrays, as Orbax writes them;
  info    JSON (`checkpoint_info`): config, step, every process's position in the training data,
          the averages that are still open, and checksums of every array and of this item itself.
Orbax renames the directory into place when all is written, so a killed process leaves only a
temporary one, which the next start removes. The checksums are ours: nothing in Orbax notices a
damaged byte.

Nothing in a checkpoint depends on how many devices or processes wrote it: it is restored onto any
mesh and into any number of processes.
"""

import contextlib
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

from tokenflow_jax import files, remote
from tokenflow_jax.log import log
from tokenflow_jax.messages import bullets, one_line
from tokenflow_jax.train import checkpoint_info
from tokenflow_jax.train.checkpoint_info import CheckpointError, complete_steps, what_to_do
from tokenflow_jax.train.checksums import compare_arrays, describe_arrays
from tokenflow_jax.train.workdir import check_path

_TRIES = 3  # of a save to a bucket
_LEAST_SLICE = 2**20  # bytes of an array that its devices write together


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: str | epath.Path, keep: int = 2):
        """Open (or create) `<folder>/checkpoints` and remove what a killed save left behind.

        The latest `keep` checkpoints stay. On accelerators writing is asynchronous. Raises
        CheckpointError for a folder that cannot have checkpoints, or an incomplete newest one.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1")
        check_path(folder)
        self.directory = files.absolute(folder) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            # Orbax's own cleaning overlooks a directory that it was killed right after making.
            _remove_unfinished(self.directory)
            if remote.is_remote(self.directory):
                checkpoint_info.mark_copies(self.directory)
        checkpoint_info.check_newest(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep)]),
                # On CPU the host copy is the buffer that the next step overwrites.
                enable_async_checkpointing=jax.default_backend() != "cpu",
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": _array_handler(), "info": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def save(
        self,
        step: int,
        state: Any,
        data: Any,
        config: Mapping[str, Any],
        averages: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint named by its step; return when the state may be overwritten.

        `data.get_state()` is this process's position in the data, `averages` are the open ones of
        the curves. Raises CheckpointError if the disk is full or not writable; earlier checkpoints
        are intact.
        """
        info = {
            "step": step,
            "config": dict(config),
            "process_count": jax.process_count(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "data": _of_all_processes(data.get_state()),
            "averages": dict(averages or {}),
            "arrays": describe_arrays(state, with_sums=True),
        }
        items = {
            "state": ocp.args.PyTreeSave(state),
            "info": ocp.args.JsonSave(checkpoint_info.seal(info)),
        }
        args = ocp.args.Composite(**items)
        with self._explained_write_errors(step):
            for left in reversed(range(_TRIES)):
                try:
                    self._manager.save(step, args=args, force=True)
                    break
                except (OSError, ValueError, RuntimeError) as error:
                    # Stores fail now and then. Several processes would have to agree on this.
                    remote_and_alone = remote.is_remote(self.directory) and jax.process_count() == 1
                    if not left or not remote_and_alone:
                        raise
                    log.warning("saving step %d is tried again (%s)", step, one_line(error))
                    files.remove(self.path(step))

    def wait(self) -> None:
        """Wait until a save in the background is complete; raise as `save` does."""
        with self._explained_write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending work and release the manager's threads; raise as `save` does."""
        with self._explained_write_errors():
            self._manager.close()

    def read_info(self, step: int) -> dict[str, Any]:
        """Return the info item of a checkpoint; raise as `checkpoint_info.read_info` does."""
        return checkpoint_info.read_info(self.path(step))

    def restore(self, step: int, like: Any, data: Any) -> Any:
        """Restore the state onto the shardings of `like`, and the position in the data.

        `data.set_state` gets the positions of all processes that saved. Raises CheckpointError for
        arrays that are absent, left over, or of another shape or dtype (all are listed), for
        damaged bytes, and for a position in other data.
        """
        info, path = self.read_info(step), self.path(step)
        if info.get("step", step) != step:
            raise CheckpointError(
                f"{path} is a copy of the checkpoint of step {info['step']}{what_to_do(path)}"
            )
        problems = compare_arrays(info["arrays"], describe_arrays(like))
        if problems:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run:\n"
                + bullets(problems)
                + "\nUse the config of the checkpoint, or another --workdir."
            )
        where = ocp.checkpoint_utils.construct_restore_args(like)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(like, restore_args=where))
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # a damaged file makes Orbax raise almost anything
            raise CheckpointError(
                f"checkpoint {path} cannot be read, it may be damaged ({one_line(error)})"
                + what_to_do(path)
            ) from error
        check_checksums(info["arrays"], restored.state, path)
        try:
            data.set_state(info["data"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error
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
            complete = [other for other in complete_steps(self.directory) if other != step]
            intact = f"; the last complete one is {self.path(complete[-1])}" if complete else ""
            reason = full or one_line(error)
            raise CheckpointError(
                f"{name} could not be written ({reason}){intact}. Free some space (or correct "
                "the permissions), or lower --config.keep_checkpoints, then run the same command "
                "again."
            ) from error


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Return what writes arrays, small ones from one device.

    Each of the devices that have an array would write a slice of it, however small: with 300 small
    arrays on eight devices a save took 1.8 times as long.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
    scalars = [(kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, np.number)]
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler()), *scalars
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def check_checksums(saved: Mapping[str, Any], tree: Any, path: epath.Path) -> None:
    """Raise CheckpointError that names the restored arrays whose bytes are not those saved."""
    found = describe_arrays(tree, with_sums=True)
    damaged = [name for name, entry in found.items() if entry["sum32"] != saved[name]["sum32"]]
    if damaged:
        raise CheckpointError(
            f"checkpoint {path} is damaged on disk; the bytes differ from those saved in:\n"
            + bullets(damaged)
            + what_to_do(path)
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
