"""Converts weights between PyTorch files and our checkpoints, one array at a time.

Everything is a mapping of lazy tensors: a source is opened as our arrays by path, and a target is
written from them. Memory holds one of our arrays and the tensors that it is made of.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tokenflow_jax import files, hub, remote, shipped
from tokenflow_jax.messages import bullets, one_line, shown
from tokenflow_jax.train import checkpoint_info
from tokenflow_jax.weights import record
from tokenflow_jax.weights.formats import orbax as orbax_files
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import (
    WEIGHT_ENDINGS,
    find_weights,
    open_state_dict,
    open_state_dicts,
)
from tokenflow_jax.weights.formats.torch_zip import write_torch_zip
from tokenflow_jax.weights.lazy import LazyTensor, in_memory, watched
from tokenflow_jax.weights.lora import merged
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import (
    CheckpointMismatch,
    Tensors,
    flatten,
    flax_arrays,
    torch_tensors,
)

TORCH_FILES = (".pt", ".safetensors")  # the endings that are written


class Source(NamedTuple):
    """Opened weights that fit their model."""

    config: Any  # of the model
    arrays: Tensors  # parameters by our paths
    buffers: Tensors  # what a PyTorch file holds beyond them, by torch name
    weights: str  # "ema" or "raw"
    files: tuple[str, ...] = ()  # the PyTorch files that hold them
    saved: Mapping[str, Any] = {}  # the config of the run that wrote it, or a file's record of that
    step: int | None = None  # of a checkpoint of ours


class Written(NamedTuple):
    """The weights that were written ("ema" or "raw"), the number of tensors, their bytes."""

    weights: str
    tensors: int
    nbytes: int


def is_torch(path: str | os.PathLike) -> bool:
    """Tell weights in another format, a file or a folder of files, from a checkpoint of ours.

    Any file is one, whatever its name; a folder if it holds no checkpoint of ours.
    """
    path = shipped.resolved(path)
    kind = remote.kind_of(path)
    if kind == "folder":
        try:
            checkpoint_info.find_checkpoint(path)
        except (checkpoint_info.CheckpointError, OSError):
            return any(name.lower().endswith(WEIGHT_ENDINGS) for name in remote.names_in(path))
        return False
    return bool(kind) or path.lower().endswith(WEIGHT_ENDINGS)


def knows_itself(path: str | os.PathLike) -> bool:
    """Tell whether weights record which model they are: checkpoints and files of ours do."""
    return not is_torch(path) or record.read_record(path) is not None


def variant_config(path: str, variant: str | None, variants: Mapping[str, Any]) -> Any:
    """Return the config of a named or released variant; None for a model that records its own."""
    if variant is None and (release := hub.release_of(path)):
        variant = release.variant
    if variant is None and knows_itself(path):
        return None
    if variant not in variants:
        kind = "a PyTorch checkpoint" if is_torch(path) else "a checkpoint of ours"
        raise ValueError(
            f"{path} is {kind}: say which model it holds, variant=one of {sorted(variants)} "
            f"(got {variant!r})"
        )
    return variants[variant]


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    part: Part,
    config: Any = None,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Written:
    """Convert one set of weights.

    Args:
      src: a PyTorch checkpoint (see `open_state_dict`), a training workdir, one of its
        checkpoints, or what this function wrote.
      dst: a `.safetensors` file; a `.pt` file, which will hold {"model": state_dict}; otherwise a
        directory that `Tokenizer.load` and `config.init_from` take. All of them record the model.
      part: which model it is.
      config: of the model; only a PyTorch checkpoint that does not record it needs one.
      weights: "ema", "raw", or None for EMA when there is one.
      dtype: of the parameters: "float32", "bfloat16" or "float16"; None keeps the source's.
        Buffers stay as they are.
      step: which checkpoint of a workdir; the newest when None.
      overwrite: replace what is at `dst`, once the new one is complete.
      more: further entries of what is recorded.

    Raises:
      CheckpointMismatch: names, shapes or types that do not fit, all of them.
      UnsafeCheckpoint: the source wants to run something.
      ValueError: the source cannot be read, lacks the weights, or does not fit `config`.
      OSError: the target exists or cannot be written.
    """
    source = open_source(src, part, config, weights=weights, step=step)
    written = {path: cast(tensor, dtype) for path, tensor in source.arrays.items()}
    about = record.make_record(part.stage, source.config, source.saved, more)
    with files.write_atomically(dst, overwrite) as partial:
        if os.fspath(dst).endswith(TORCH_FILES):
            lacking = part.buffers(source.config)
            tensors = torch_tensors(written, part.table(source.config))
            tensors |= {name: in_memory(name, array) for name, array in lacking.items()}
            tensors |= source.buffers
            about |= part.identify(source.config, written)
            if os.fspath(dst).endswith(".pt"):
                own = {"record": in_memory("record", record.to_array(about))}
                write_torch_zip(partial, {"model": watched(tensors), record.KEY: own})
            else:
                write_safetensors(partial, watched(tensors), {record.KEY: record.to_text(about)})
        else:
            tensors = {f"params/{path}": tensor for path, tensor in written.items()}
            for name, tensor in source.buffers.items():
                tensors["buffers/" + name.replace(".", "/")] = tensor
            origin = {
                "weights": source.weights,
                "path": os.path.basename(os.path.normpath(src)),
                "sha256": {os.path.basename(file): _sha256(file) for file in source.files},
            }
            orbax_files.save_weights(partial, watched(tensors), about, origin)
    return Written(source.weights, len(tensors), sum(t.nbytes for t in tensors.values()))


def open_source(
    path: str | os.PathLike,
    part: Part,
    config: Any = None,
    *,
    weights: str | None = None,
    step: int | None = None,
) -> Source:
    """Open weights as our arrays, once all fit, without reading data; see `convert`."""
    path = record.part_in(path, part.stage)  # the tokenizer of a saved language model
    if is_torch(path):
        return _open_torch(path, part, config, weights)
    return _open_ours(path, part, config, weights, step)


def _open_torch(path: str | os.PathLike, part: Part, config: Any, weights: str | None) -> Source:
    saved = record.read_record(path) or {}
    if saved:
        config = _recorded_config(path, part, saved, config)
    elif config is None:
        raise ValueError(f"{path} is a PyTorch checkpoint: say which variant it holds")
    states = {key: state for key, state in open_state_dicts(path).items() if key != record.KEY}
    found = find_weights(states)
    if not any(found.values()):
        found = {"raw": open_state_dict(path)}
    weights = _choose(path, found, weights)
    try:
        state, table = part.check(found[weights], config, not saved), part.table(config)
    except CheckpointMismatch:
        raise
    except ValueError as error:  # a model that PyTorch's names cannot express
        raise ValueError(f"{path}: {error}") from None
    buffers = {name: tensor for name, tensor in state.items() if table.is_buffer(name)}
    arrays = flax_arrays(state, table, part.template(config))
    return Source(config, arrays, buffers, weights, found[weights].files, saved)


def _open_ours(
    path: str | os.PathLike, part: Part, config: Any, weights: str | None, step: int | None
) -> Source:
    info, tensors = orbax_files.open_checkpoint(path, step, ("params", "ema", "buffers"))
    config = _recorded_config(path, part, info["config"], config)

    def field(name: str) -> Tensors:
        start = f"{name}/"
        return {p.removeprefix(start): t for p, t in tensors.items() if p.startswith(start)}

    found = {"ema": field("ema"), "raw": field("params")}
    weights = _choose(path, found, weights)
    arrays = found[weights]
    if info["config"].get("lora", {}).get("rank"):  # an average follows only what trains
        arrays = merged(found["raw"] | arrays, info["config"]["lora"])
    if wrong := different_shapes(arrays, part.template(config)):
        raise ValueError(f"{path} does not fit its own config:\n{bullets(wrong)}")
    config, arrays = part.finish(config, arrays)
    buffers = {name.replace("/", "."): tensor for name, tensor in field("buffers").items()}
    step = info["step"] if isinstance(info["step"], int) else None
    return Source(config, arrays, buffers, weights, saved=info["config"], step=step)


def _recorded_config(
    path: str | os.PathLike, part: Part, saved: Mapping[str, Any], config: Any
) -> Any:
    """Return the hyper-parameters that a checkpoint records; ValueError if they are not `config`.

    A `config` of None accepts any.
    """
    stage = saved.get("stage")
    if stage != part.stage:
        raise ValueError(f"{path} is a checkpoint of stage {shown(stage)}, not of {part.stage!r}")
    try:
        _check_sizes(saved["model"])
        own = part.config_class(**saved["model"])
        part.template(own)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config.model is damaged ({one_line(error)})") from None
    if config is not None and own != config:
        raise ValueError(f"{path} does not hold {part.describe(config)}, but {part.describe(own)}")
    return own


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse sizes of a damaged config that would take forever to lay out."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
            continue
        # Blocks of the pixel branch are traced one by one, layers of transformers all at once.
        most = 64 if "block" in name else 1000 if re.search("depth|layer", name) else 2**24
        sizes = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(size, int) and not -1 <= size <= most for size in sizes):
            raise ValueError(f"{one_line(name)} is {shown(value)}")


def different_shapes(arrays: Mapping[str, Any], template: Mapping[str, Any]) -> list[str]:
    """Return a line for every parameter (by path) whose shape is not the (nested) template's."""
    have = {name: tuple(array.shape) for name, array in arrays.items()}
    want = {name: tuple(leaf.shape) for name, leaf in flatten(template).items()}
    return [
        f"{name}: {have.get(name)} given, {want.get(name)} in the config"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]


def _choose(path: str | os.PathLike, found: Mapping[str, Any], weights: str | None) -> str:
    """Return the weights to take: the requested ones, else EMA when there is one."""
    have = [name for name in ("ema", "raw") if found.get(name)]
    if weights is None and have:
        return have[0]
    if weights not in have:
        raise ValueError(
            f"{path} has no {weights or ''} weights; it has {' and '.join(have) or 'none'}"
        )
    return weights


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """Return a tensor that is converted when it is read; None keeps its dtype."""
    if dtype is None or tensor.dtype == jnp.dtype(dtype):
        return tensor
    target = jnp.dtype(dtype)

    def converted(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = array.astype(target)
        if np.isinf(out).sum() > np.isinf(array).sum():
            raise ValueError(
                f"{one_line(tensor.name)} has values beyond {dtype}; take bfloat16 or float32"
            )
        return out

    return LazyTensor(
        tensor.name,
        tensor.shape,
        target,
        lambda: converted(tensor.read()),
        lambda index: converted(tensor[index]),
    )


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
