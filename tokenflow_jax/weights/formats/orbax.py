"""Our own checkpoints as weights: read one array at a time, and written from lazy tensors.

Converted weights are a directory with two of a checkpoint's items (see `train.checkpoint`):
  state   the arrays: params, and what a PyTorch file held beyond them (buffers, by torch name);
  info    the config, the source, and name, shape, dtype and checksum of every array.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from tokenflow_jax import files, remote
from tokenflow_jax.messages import one_line, shown
from tokenflow_jax.train import checkpoint, checkpoint_info, checksums, workdir
from tokenflow_jax.train.checkpoint_info import CheckpointError
from tokenflow_jax.weights.lazy import Index, LazyTensor
from tokenflow_jax.weights.rules import unflatten

_CHUNK_BYTES = 4 * 2**20  # read and decompressed at once; more costs memory, less costs time
_BATCH_BYTES = 16 * 2**20  # written at once, unless one array is larger
# A checkpoint does not change: without these every read asks the store for what is known.
_UNCHANGED = {"recheck_cached_data": False, "recheck_cached_metadata": False}
# Arrays that no file holds are zeros: a few bytes may declare terabytes. Real weights take about
# their size on disk.
_FREE_BYTES, _MOST_UNFOLDING = 64 * 2**20, 200


def open_checkpoint(
    path: str | epath.Path, step: int | None = None, subtrees: tuple[str, ...] = ("params", "ema")
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the info item of a checkpoint, and arrays by path ("params/a/b").

    The path is that of a workdir, its `checkpoints` folder, one checkpoint, or converted weights
    (whose step is 0); `subtrees` are the fields of the training state to open, of which one must
    be there. Reading a whole array checks its bytes, reading a part does not.
    """
    path = checkpoint_info.find_checkpoint(path, step)
    info = checkpoint_info.read_info(path)
    # The first formats leave it out; those checkpoints are named after it.
    info.setdefault("step", int(path.name) if path.name.isdecimal() else None)
    names = [name for name in info["arrays"] if name.split("/")[0] in subtrees]
    if not names:
        fields = sorted({name.split("/")[0] for name in info["arrays"]})
        raise CheckpointError(f"{path} has none of {list(subtrees)}; it has {fields}")

    state = path / "state"
    is_remote = remote.is_remote(state)
    declared = sum(_declared_bytes(info["arrays"][name], path) for name in names)
    if not is_remote:
        held = sum(p.stat().st_size for p in pathlib.Path(state).rglob("*"))
        if declared > _FREE_BYTES + _MOST_UNFOLDING * held:
            raise CheckpointError(
                f"{path} declares {declared:,} bytes of arrays in {held:,} bytes of files; it is "
                "incomplete or damaged, copy it again"
            )
    # Not a URL: "#", "%" and the like are part of a name.
    base = {"driver": "file", "path": f"{state}/"}
    if is_remote:
        bucket, _, inside = f"{state}/".removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": inside}
    # One thread each, because every thread holds a chunk in memory.
    context = ts.Context({f"{kind}_concurrency": {"limit": 1} for kind in ("data_copy", "file_io")})

    def load(name: str, index: Index | None = None) -> np.ndarray:
        # What Orbax does, for one array, without reading the whole tree's metadata for each.
        kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
        try:
            spec = {"driver": "zarr", "kvstore": kvstore, **_UNCHANGED}
            store = ts.open(spec, context=context, open=True)
            store, entry = store.result(), info["arrays"][name]
            if list(store.shape) != entry["shape"]:
                raise ValueError(f"shape {store.shape}, not {entry['shape']}")
            array = (store if index is None else store[index]).read().result()
        except (ValueError, MemoryError) as error:
            reason = f"{path}: {name} cannot be read ({one_line(error)})"
            raise CheckpointError(reason + checkpoint_info.what_to_do(path)) from error
        if index is None:
            check(name, array)
        return array

    def check(name: str, array: Any) -> None:
        checkpoint.check_checksums(info["arrays"], unflatten({name: array}), path)

    def lazy(name: str, shape: Sequence[int], dtype: str, **_: Any) -> LazyTensor:
        how = (functools.partial(f, name) for f in (load, load, check))
        return LazyTensor(name, tuple(shape), jnp.dtype(dtype), *how)

    return info, {name: lazy(name, **info["arrays"][name]) for name in names}


def _declared_bytes(entry: Mapping[str, Any], path: epath.Path) -> int:
    try:
        return math.prod(entry["shape"]) * jnp.dtype(entry["dtype"]).itemsize
    except TypeError:
        raise CheckpointError(f"{path} has an array of type {shown(entry['dtype'])}") from None


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes lazy tensors a few at a time, so that only those are in memory."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.sums: dict[str, int] = {}

    async def serialize(
        self, values: Sequence[LazyTensor], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        for part in _batches(values):
            await self._write(values[part], infos[part], args[part])
        return []

    async def _write(self, values: Sequence[LazyTensor], infos: Any, args: Any) -> None:
        # A function of its own: the data is freed when it returns.
        arrays = [value.read() for value in values]
        for value, array in zip(values, arrays, strict=True):
            self.sums[value.name] = checksums.sum32(array)
        for written in await super().serialize(arrays, infos, args):
            written.result()


def _batches(tensors: Sequence[LazyTensor]) -> Iterator[slice]:
    """Yield neighbors of a few megabytes together: every write of Orbax's costs some time."""
    start, size = 0, 0
    for end, tensor in enumerate(tensors):
        if end > start and size + tensor.nbytes > _BATCH_BYTES:
            yield slice(start, end)
            start, size = end, 0
        size += tensor.nbytes
    yield slice(start, len(tensors))


def save_weights(
    path: str | os.PathLike,
    arrays: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """Write a directory that `open_checkpoint` reads, incomplete until this returns.

    `arrays` are by path ("params/a/b"), with a few megabytes in memory at a time; `config` is that
    of a training run, and `source` says where the weights come from. A full disk is an OSError.
    """
    tree = unflatten({name: dataclasses.replace(t, name=name) for name, t in arrays.items()})
    handler = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((LazyTensor, handler))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    path = files.absolute(path)
    workdir.check_path(path.with_name(path.name.removeprefix(".partial-")))
    try:
        tree_handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(tree_handler) as checkpointer:
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            checkpointer.save(path / "state", args=args)
    except (ValueError, RuntimeError) as error:  # TensorStore's form of the system's errors
        reason = files.full_disk(error)
        if reason is None:
            raise
        raise OSError(reason) from error
    described = checksums.describe_arrays(tree)
    info = {
        "step": 0,
        "config": dict(config),
        "source": dict(source),
        "arrays": {n: {**entry, "sum32": handler.sums[n]} for n, entry in described.items()},
    }
    (path / "info").mkdir()
    (path / "info" / "metadata").write_text(json.dumps(checkpoint_info.seal(info)))
