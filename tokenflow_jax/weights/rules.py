"""Rules that carry weights between PyTorch's names and layouts and our parameter tree.

A rule is (our path, torch name, transform) and works in both directions. `{i}` and `{j}` in both
stand for the same number; `{layer}` in the torch name alone numbers the layers that our scanned
modules keep stacked in one array, on its leading axis:

    Rule("level_{i}_block_{j}/conv1/kernel", "conv_blocks.{i}.res.{j}.conv1.weight", CONV)
    Rule("blocks/mlp/fc1/bias", "blocks.{layer}.mlp.fc1.bias")

Several torch names are the equal parts of one of our arrays, side by side on its last axis:

    Rule("attention/qkv/bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias"))

Which numbers exist is read from the model's own shapes (or parameters), so one table serves every
depth and width of an architecture.
"""

import collections
import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.weights.lazy import data


@dataclasses.dataclass(frozen=True)
class Transform:
    """Drops axes of length one, then permutes; exactly invertible.

    Attributes:
      squeeze: axes of the torch layout, all of length one, that our layout does not have.
      permutation: order of the remaining axes in our layout; None keeps it.
    """

    squeeze: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Torch layout to ours; a view."""
        array = np.squeeze(array, self.squeeze) if self.squeeze else array
        return array if self.permutation is None else np.transpose(array, self.permutation)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our layout to torch's; a view."""
        if self.permutation is not None:
            array = np.transpose(array, np.argsort(self.permutation))
        return np.expand_dims(array, self.squeeze) if self.squeeze else array

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The torch shape of an array of our `shape`; None if our array has the wrong rank."""
        if self.permutation is not None and len(shape) != len(self.permutation):
            return None
        return self.to_torch(np.broadcast_to(np.zeros((), np.bool_), tuple(shape))).shape


COPY = Transform()
DENSE = Transform(permutation=(1, 0))  # (out, in) -> (in, out)
CONV = Transform(permutation=(2, 3, 1, 0))  # (out, in, h, w) -> (h, w, in, out)
CONV1X1_DENSE = Transform(squeeze=(2, 3), permutation=(1, 0))  # (out, in, 1, 1) -> (in, out)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      path: ours, joined by "/".
      name: the torch name, or the names of equal parts of our last axis.
      transform: between the layouts, of each part.
    """

    path: str
    name: str | tuple[str, ...]
    transform: Transform = COPY

    @property
    def parts(self) -> tuple[str, ...]:
        """The torch names behind one layer of our array, with their placeholders."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def stacked(self) -> bool:
        """Whether our array holds the tensors of all layers on its leading axis."""
        return "{layer}" in self.parts[0]

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of each torch tensor behind our array's `shape`; None if it cannot be."""
        own, count = tuple(shape[1:] if self.stacked else shape), len(self.parts)
        if count > 1:
            if not own or own[-1] % count:
                return None
            own = (*own[:-1], own[-1] // count)
        return self.transform.torch_shape(own)

    def views(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """The parts of our array, in the order of `names`."""
        for layer in array if self.stacked else (array,):
            yield from np.split(layer, len(self.parts), -1) if len(self.parts) > 1 else (layer,)

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        escaped = re.escape(self.path)
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", escaped))

    def names(self, path: str, shape: Sequence[int]) -> list[str] | None:
        """Torch names behind our array at `path`, layer by layer, part by part; None: no match."""
        match = self._pattern.fullmatch(path)
        if match is None:
            return None
        layers = range(shape[0] if shape else 0) if self.stacked else (0,)
        numbers = match.groupdict()
        return [part.format(**numbers, layer=i) for i in layers for part in self.parts]


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """Everything that is known about one model's checkpoints.

    Attributes:
      model: what it is, for messages.
      rules: at most one rule may match a path.
      buffers: patterns (fnmatch) of names that are state, not parameters: see `read_buffers`.
      ignored: patterns of names that the model does not use.
    """

    model: str
    rules: tuple[Rule, ...]
    buffers: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def is_buffer(self, name: str) -> bool:
        """Whether a torch name is state, not a parameter."""
        return _matches(name, self.buffers)

    def find(self, path: str, shape: Sequence[int]) -> tuple[Rule, list[str]]:
        """Returns the rule for our path and the torch names behind it.

        Raises:
          ValueError: no rule knows the path.
        """
        for rule in self.rules:
            names = rule.names(path, shape)
            if names is not None:
                return rule, names
        raise ValueError(f"{self.model}: no conversion rule for the parameter {path}; add one")


@dataclasses.dataclass(frozen=True)
class Problems:
    """What keeps a checkpoint from fitting a model; falsy if nothing does.

    Attributes:
      missing, unexpected: torch names.
      mismatched: lines "name: shape dtype in the file, shape in the model".
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the model; `problems` holds every reason."""

    def __init__(self, model: str, problems: Problems, remedy: str | None = None):
        self.problems = problems
        kinds = (
            ("wrong shape or type", problems.mismatched),
            ("missing from the checkpoint", problems.missing),
            ("not in the model", problems.unexpected),
        )
        lines = [f"the checkpoint does not fit the {model}, {len(problems)} problems:"]
        for title, names in kinds:
            if names:
                lines += [f"{title} ({len(names)}):", *(f"  {name}" for name in names)]
        default = "choose the variant that the checkpoint was made for, or another checkpoint"
        lines.append(remedy or default)
        super().__init__("\n".join(lines))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into {"a/b/c": leaf}; boxed parameters must be unboxed before."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check(
    state: Mapping[str, Any],
    table: RuleTable,
    template: Mapping[str, Any],
    ignore: Sequence[str] = (),
) -> Problems:
    """Compares a checkpoint's names, shapes and types with a model, without reading data.

    Args:
      state: torch names to anything with `shape` and `dtype` (a StateDict, arrays).
      table: the model's rules.
      template: nested dict of anything with `shape` and `dtype`, from `jax.eval_shape`.
      ignore: patterns of further names that may be present without being used.

    Returns:
      All problems.
    """
    expected: set[str] = set()
    missing, mismatched = [], []
    for path, leaf in flatten(template).items():
        rule, names = table.find(path, leaf.shape)
        expected.update(names)
        shape = rule.torch_shape(leaf.shape)
        for name in names:
            if name not in state:
                missing.append(name)
            elif shape != tuple(state[name].shape):
                have = tuple(state[name].shape)
                wanted = shape if shape is not None else f"{tuple(leaf.shape)} in our layout"
                mismatched.append(f"{name}: {have} in the checkpoint, {wanted} in the model")
            elif _is_float(leaf.dtype) and not _is_float(state[name].dtype):
                mismatched.append(
                    f"{name}: {state[name].dtype} in the checkpoint, {leaf.dtype} in the model"
                )
    allowed = (*table.buffers, *table.ignored, *ignore)
    unexpected = [n for n in state if n not in expected and not _matches(n, allowed)]
    return Problems(tuple(missing), tuple(unexpected), tuple(mismatched))


def _is_float(dtype: Any) -> bool:
    return np.dtype(dtype).kind in "fV"  # ml_dtypes' types (bfloat16, ...) are of kind V


def iterate_flax(
    state: Mapping[str, Any],
    table: RuleTable,
    template: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    cast: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Converts a checkpoint one of our arrays at a time, after checking all of it.

    Args:
      state, table, template, ignore: as in `check`.
      cast: convert to the template's dtypes; otherwise keep the checkpoint's.

    Yields:
      ("path/of/array", array); the arrays are contiguous and own their data.

    Raises:
      CheckpointMismatch: with everything that does not fit.
    """
    problems = check(state, table, template, ignore)
    if problems:
        raise CheckpointMismatch(table.model, problems)
    for path, leaf in flatten(template).items():
        rule, names = table.find(path, leaf.shape)
        dtype = leaf.dtype if cast or not names else state[names[0]].dtype
        array = np.empty(leaf.shape, dtype)
        for name, view in zip(names, rule.views(array), strict=True):
            view[...] = rule.transform.to_flax(data(state[name]))
        yield path, array


def to_flax(
    state: Mapping[str, Any],
    table: RuleTable,
    template: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    cast: bool = True,
) -> dict[str, Any]:
    """Converts a whole checkpoint to our parameter tree.

    Args:
      state, table, template, ignore, cast: as in `iterate_flax`.

    Returns:
      Nested dict of NumPy arrays with the template's structure and shapes.

    Raises:
      CheckpointMismatch: with everything that does not fit.
    """
    return unflatten(dict(iterate_flax(state, table, template, ignore=ignore, cast=cast)))


def read_buffers(state: Mapping[str, Any], table: RuleTable) -> dict[str, np.ndarray]:
    """Reads the state of a checkpoint that is not parameters, by torch name; owned arrays."""
    return {n: np.array(data(t)) for n, t in state.items() if table.is_buffer(n)}


def iterate_torch(tree: Mapping[str, Any], table: RuleTable) -> Iterator[tuple[str, np.ndarray]]:
    """Converts our parameters to PyTorch's names and layouts, one of our arrays at a time.

    Args:
      tree: nested dict of arrays.
      table: the model's rules.

    Yields:
      (torch name, contiguous array of the same dtype).

    Raises:
      ValueError: an array without a rule, or two arrays for the same torch name.
    """
    flat = flatten(tree)
    found = {path: table.find(path, array.shape) for path, array in flat.items()}
    count = collections.Counter(name for _, names in found.values() for name in names)
    twice = sorted(name for name, times in count.items() if times > 1)
    if twice:
        raise ValueError(f"{table.model}: several parameters would become {twice}; fix the rules")
    for path, (rule, names) in found.items():
        array = np.asarray(flat[path])
        for name, view in zip(names, rule.views(array), strict=True):
            yield name, np.array(rule.transform.to_torch(view), order="C")


def to_torch(
    tree: Mapping[str, Any],
    table: RuleTable,
    buffers: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Converts our parameters to a PyTorch state_dict: the exact inverse of `to_flax`.

    Args:
      tree: nested dict of arrays, as from `to_flax`.
      table: the model's rules.
      buffers: state to hand on unchanged, from `read_buffers`.

    Returns:
      Torch names to NumPy arrays in torch's layout.
    """
    return dict(iterate_torch(tree, table)) | dict(buffers or {})
