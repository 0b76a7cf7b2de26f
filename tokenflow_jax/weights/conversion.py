"""Converts weights between PyTorch files and our checkpoints, one array at a time.

Everything is a mapping of lazy tensors: a source is opened as our arrays by path, and a target is
written from them. What is in memory is one of our arrays and the tensors that it is made of.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tokenflow_jax import files
from tokenflow_jax.stages import PARTS, Part
from tokenflow_jax.weights.formats import orbax as orbax_files
from tokenflow_jax.weights.formats.torch import (
    NoSuchKey,
    StateDict,
    open_state_dict,
    write_safetensors,
)
from tokenflow_jax.weights.formats.torch_zip_writer import write_torch_zip
from tokenflow_jax.weights.lazy import LazyTensor
from tokenflow_jax.weights.rules import RuleTable, flatten

TORCH_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".index.json")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("ema", "raw")

Tensors = dict[str, LazyTensor]


class Source(NamedTuple):
    """Weights that were opened and fit their model.

    Attributes:
      config: of the model.
      arrays: parameters by our paths.
      buffers: what a PyTorch file holds beyond them, by torch name.
      weights: which ones, "ema" or "raw".
      files: PyTorch files that hold them; none for a checkpoint of ours.
      saved: the whole config of the run that wrote a checkpoint of ours.
    """

    config: Any
    arrays: Tensors
    buffers: Tensors
    weights: str
    files: tuple[str, ...] = ()
    saved: Mapping[str, Any] = {}


class Written(NamedTuple):
    """What `convert` wrote: which weights, how many tensors, and their size in bytes."""

    weights: str
    tensors: int
    nbytes: int


def is_torch(path: str | os.PathLike) -> bool:
    """Whether the path is a PyTorch checkpoint: a file, or a folder that holds one."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return any(name.endswith(TORCH_ENDINGS) for name in os.listdir(path))
    return path.endswith(TORCH_ENDINGS)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    config: Any = None,
    *,
    part: Part = PARTS["tokenizer"],
    weights: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Written:
    """Converts one set of weights.

    Args:
      src: a PyTorch checkpoint (see `open_state_dict`), a training workdir, one of its
        checkpoints, or what this function wrote.
      dst: what to write: a `.safetensors` file; a `.pt` file, which will hold {"model":
        state_dict}; otherwise a directory that `Tokenizer.load` and `config.init_from` take.
      config: of the model; needed for a PyTorch checkpoint, which does not know.
      part: which model it is.
      weights: "ema", "raw", or None for EMA when there is one.
      dtype: of the parameters, one of DTYPES; None keeps the source's. Buffers stay as they are.
      step: which checkpoint of a workdir; the newest when None.
      overwrite: whether something at `dst` may be replaced; it stays until the new one is complete.
      more: further entries of the config that a directory of ours notes.

    Returns:
      What was written.

    Raises:
      CheckpointMismatch: names, shapes or types that do not fit, all of them.
      UnsafeCheckpoint: the source wants to run something.
      ValueError: the source cannot be read, lacks the weights, or does not fit `config`.
      OSError: the target exists or cannot be written.
    """
    source = open_source(src, config, part=part, weights=weights, step=step)
    with files.write_atomically(dst, overwrite) as partial:
        if os.fspath(dst).endswith((".pt", ".safetensors")):
            missing = {
                name: LazyTensor(name, array.shape, array.dtype, lambda array=array: array)
                for name, array in part.buffers(source.config).items()
            }
            parameters = torch_tensors(source.arrays, part.table(source.config))
            parameters = {name: cast(tensor, dtype) for name, tensor in parameters.items()}
            tensors = parameters | missing | source.buffers
            if os.fspath(dst).endswith(".pt"):
                write_torch_zip(partial, {"model": tensors})
            else:
                write_safetensors(partial, tensors)
        else:
            tensors = {f"params/{path}": cast(t, dtype) for path, t in source.arrays.items()}
            for name, tensor in source.buffers.items():
                tensors["buffers/" + name.replace(".", "/")] = tensor
            saved_config = {"model": dataclasses.asdict(source.config), "stage": part.stage}
            saved_config |= more or {}
            about = {
                "weights": source.weights,
                "path": os.path.basename(os.path.normpath(src)),
                "sha256": {os.path.basename(file): _sha256(file) for file in source.files},
            }
            orbax_files.save_weights(partial, tensors, saved_config, about)
    return Written(source.weights, len(tensors), sum(t.nbytes for t in tensors.values()))


def open_source(
    path: str | os.PathLike,
    config: Any = None,
    *,
    part: Part = PARTS["tokenizer"],
    weights: str | None = None,
    step: int | None = None,
) -> Source:
    """Opens weights as our arrays, after checking that all of them fit; no data is read yet.

    Args:
      path, config, part, weights, step: as for `convert`, which also says what is raised.
    """
    if is_torch(path):
        return _open_torch(path, config, part, weights)
    return _open_ours(path, config, part, weights, step)


def _open_torch(path: str | os.PathLike, config: Any, part: Part, weights: str | None) -> Source:
    """Opens a PyTorch checkpoint as our arrays."""
    if config is None:
        raise ValueError(f"{path} is a PyTorch checkpoint: say which variant it holds")
    ema = _open_key(path, "ema")
    raw = _open_key(path, "model") or _open_key(path, "state_dict")
    if ema is None and raw is None:
        raw = open_state_dict(path)  # tensors without a key
    weights = _choose(path, {"ema": ema, "raw": raw}, weights)
    state = ema if weights == "ema" else raw
    part.check(state, config)
    table = part.table(config)
    buffers = {name: tensor for name, tensor in state.items() if table.is_buffer(name)}
    arrays = flax_arrays(state, table, part.template(config))
    return Source(config, arrays, buffers, weights, state.files)


def _open_key(path: str | os.PathLike, key: str) -> StateDict | None:
    try:
        return open_state_dict(path, key)
    except NoSuchKey:
        return None


def _open_ours(
    path: str | os.PathLike, config: Any, part: Part, weights: str | None, step: int | None
) -> Source:
    """Opens a checkpoint of ours."""
    info, tensors = orbax_files.open_checkpoint(path, step, ("params", "ema", "buffers"))
    stage = info["config"].get("stage")
    if stage != part.stage:
        raise ValueError(f"{path} is a checkpoint of stage {stage!r}, not of {part.stage!r}")
    saved = part.config_class(**info["config"]["model"])
    if config is not None and saved != config:
        raise ValueError(
            f"{path} does not hold {part.describe(config)}, but {part.describe(saved)}"
        )

    def field(name: str) -> Tensors:
        """The arrays of one field of the state, by their paths in it."""
        start = f"{name}/"
        return {p.removeprefix(start): t for p, t in tensors.items() if p.startswith(start)}

    weights = _choose(path, {"ema": field("ema"), "raw": field("params")}, weights)
    arrays = field("ema" if weights == "ema" else "params")
    have = {name: tensor.shape for name, tensor in arrays.items()}
    want = {name: leaf.shape for name, leaf in flatten(part.template(saved)).items()}
    wrong = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
    if wrong:
        lines = [f"  {name}: {have.get(name)} there, {want.get(name)} here" for name in wrong]
        raise ValueError(f"{path} does not fit its own config:\n" + "\n".join(lines))
    buffers = {name.replace("/", "."): tensor for name, tensor in field("buffers").items()}
    return Source(saved, arrays, buffers, weights, saved=info["config"])


def _choose(path: str | os.PathLike, there: Mapping[str, Any], weights: str | None) -> str:
    """Which weights to take: those asked for, else EMA when there is one."""
    have = [name for name in WEIGHTS if there[name]]
    if weights is None and have:
        return have[0]
    if weights not in have:
        raise ValueError(
            f"{path} has no {weights or ''} weights; it has {' and '.join(have) or 'none'}"
        )
    return weights


def flax_arrays(state: Mapping[str, Any], table: RuleTable, template: Mapping[str, Any]) -> Tensors:
    """A PyTorch checkpoint that fits its model as our arrays, by path.

    Args:
      state: torch names to lazy tensors.
      table: the model's rules.
      template: nested shapes of the parameters.
    """

    def array(path: str, shape: tuple[int, ...]) -> LazyTensor:
        rule, names = table.find(path, shape)
        dtype = jnp.result_type(*(state[name].dtype for name in names))

        def load() -> np.ndarray:
            out = np.empty(shape, dtype)
            for name, view in zip(names, rule.views(out), strict=True):
                view[...] = rule.transform.to_flax(state[name].read())
            return out

        return LazyTensor(path, shape, dtype, load)

    return {path: array(path, tuple(leaf.shape)) for path, leaf in flatten(template).items()}


def torch_tensors(arrays: Mapping[str, LazyTensor], table: RuleTable) -> Tensors:
    """Our arrays as PyTorch's tensors, by name: the inverse of `flax_arrays`.

    The tensors of one array follow each other, and the array is read once for all of them.
    """
    tensors: Tensors = {}
    last: dict[str, list[np.ndarray]] = {}

    def views(array: LazyTensor, rule: Any) -> list[np.ndarray]:
        if array.name not in last:
            last.clear()  # before the next one is read
            last[array.name] = [rule.transform.to_torch(v) for v in rule.views(array.read())]
        return last[array.name]

    for path, array in arrays.items():
        rule, names = table.find(path, array.shape)
        shape = rule.torch_shape(array.shape)
        for i, name in enumerate(names):
            load = lambda array=array, rule=rule, i=i: views(array, rule)[i]  # noqa: E731
            tensors[name] = LazyTensor(name, shape, array.dtype, load)
    return tensors


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """A tensor that is converted when it is read; None keeps it."""
    if dtype is None or tensor.dtype == jnp.dtype(dtype):
        return tensor
    target = jnp.dtype(dtype)

    def load() -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):
            out = array.astype(target)
        if np.isinf(out).sum() > np.isinf(array).sum():
            raise ValueError(f"{tensor.name} has values beyond {dtype}; take bfloat16 or float32")
        return out

    return LazyTensor(tensor.name, tensor.shape, target, load)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
