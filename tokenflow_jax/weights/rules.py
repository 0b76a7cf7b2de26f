"""Rules that carry weights between PyTorch's names and layouts and our parameter tree.

A rule is (our path, torch name, transform) and works in both directions. `{i}` and `{j}` in both
stand for the same number; `{layer}` in the torch name alone numbers the layers that our scanned
modules stack in one array, on its leading axis:

    Rule("level_{i}_block_{j}/conv1/kernel", "conv_blocks.{i}.res.{j}.conv1.weight", CONV)
    Rule("blocks/mlp/fc1/bias", "blocks.{layer}.mlp.fc1.bias")

Several torch names are equal parts of one of our arrays, side by side on its last axis:

    Rule("attention/qkv/bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias"))

The numbers come from the model's own shapes, so one table serves every depth and width.
"""

import collections
import dataclasses
import fnmatch
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.weights import wrappers
from tokenflow_jax.weights.lazy import Index, LazyTensor, part_shape, whole
from tokenflow_jax.weights.transforms import COPY, DENSE, Transform

Tensors = dict[str, LazyTensor]
# Nested dicts <-> {"a/b/c": leaf}; boxed parameters must be unboxed before.
flatten = functools.partial(traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: our path, the torch name or the names of equal parts, the transform."""

    path: str
    name: str | tuple[str, ...]
    transform: Transform = COPY  # of each part

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def stacked(self) -> bool:
        """True if our array holds the tensors of all layers on its leading axis."""
        return "{layer}" in self.parts[0]

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape of each torch tensor behind our `shape`; None if it cannot be."""
        own, count = tuple(shape[1:] if self.stacked else shape), len(self.parts)
        if count > 1:
            if not own or own[-1] % count:
                return None
            own = (*own[:-1], own[-1] // count)
        return self.transform.torch_shape(own)

    def views(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the parts of our array, in the order of `names`."""
        for layer in array if self.stacked else (array,):
            yield from np.split(layer, len(self.parts), -1) if len(self.parts) > 1 else (layer,)

    def sources(self, shape: Sequence[int], index: Index) -> Iterator[tuple[int, Index, Any]]:
        """Yield what a part of our array of `shape` is made of.

        Each is the place in `names` of a torch tensor, its index there, and where its data, in our
        layout, goes in the part.
        """
        layers, own = (index[0], index[1:]) if self.stacked else (slice(0, 1), index)
        count = len(self.parts)
        size = shape[-1] // count if count > 1 else 0
        for layer in range(layers.start, layers.stop):
            where = (layer - layers.start,) if self.stacked else ()
            for i in range(count):
                if count == 1:
                    yield layer, self.transform.torch_index(own), (*where, ...)
                    continue
                begin = i * size
                start, stop = max(begin, own[-1].start), min(begin + size, own[-1].stop)
                if start < stop:
                    place = slice(start - own[-1].start, stop - own[-1].start)
                    inner = (*own[:-1], slice(start - begin, stop - begin))
                    yield layer * count + i, self.transform.torch_index(inner), (*where, ..., place)

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        escaped = re.escape(self.path)
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", escaped))

    def names(self, path: str, shape: Sequence[int]) -> list[str] | None:
        """Return the torch names of our array, by layer, then part; None if the path is another."""
        match = self._pattern.fullmatch(path)
        if match is None:
            return None
        layers = range(shape[0] if shape else 0) if self.stacked else (0,)
        numbers = match.groupdict()
        return [part.format(**numbers, layer=i) for i in layers for part in self.parts]


def layer(path: str, name: str, kernel: Transform = DENSE, *, norm: bool = False) -> list[Rule]:
    """Return rules for a layer's weight and bias; a norm's weight is called scale here."""
    ours, transform = ("scale", COPY) if norm else ("kernel", kernel)
    weight = Rule(f"{path}/{ours}", f"{name}.weight", transform)
    return [weight, Rule(f"{path}/bias", f"{name}.bias")]


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """The rules of one model's checkpoints; `model` is its name in messages."""

    model: str
    rules: tuple[Rule, ...]  # at most one may match a path
    buffers: tuple[str, ...] = ()  # patterns (fnmatch) of names that are state, not parameters
    ignored: tuple[str, ...] = ()  # patterns of names that the model does not use

    def is_buffer(self, name: str) -> bool:
        return _matches(name, self.buffers)

    def find(self, path: str, shape: Sequence[int]) -> tuple[Rule, list[str]]:
        """Return the rule for our path and the torch names behind it; ValueError without one."""
        for rule in self.rules:
            names = rule.names(path, shape)
            if names is not None:
                return rule, names
        raise ValueError(f"{self.model}: no conversion rule for the parameter {path}; add one")


@functools.cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(fnmatch.translate, patterns)) or "(?!)")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return bool(_pattern(patterns).match(name))


@dataclasses.dataclass(frozen=True)
class Problems:
    """Everything that keeps a checkpoint from fitting a model; falsy if nothing does."""

    missing: tuple[str, ...] = ()  # torch names
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()  # "name: shape or dtype in the checkpoint, ... in the model"

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the model; `problems` holds every reason, the text some of each."""

    def __init__(self, model: str, problems: Problems, remedy: str | None = None, path: str = ""):
        self.problems = problems
        kinds = (
            problems.mismatched,
            [f"{name}: missing from the checkpoint" for name in problems.missing],
            [f"{name}: not in the model" for name in problems.unexpected],
        )
        # In turn, because a few are shown; those in the order of kinds.
        mixed = [line for row in itertools.zip_longest(*kinds) for line in row if line is not None]
        first = [line for lines in kinds for line in lines[:10] if line in mixed[:10]]
        lines = [*first, *mixed[10:]]
        default = "choose the variant that the checkpoint was made for, or another checkpoint"
        super().__init__(
            f"the checkpoint{path and ' '}{path} does not fit the {model}, "
            f"{len(problems)} problems:\n{bullets(lines)}\n{remedy or default}"
        )


def fit(
    state: Mapping[str, Any], table: RuleTable, template: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Problems]:
    """Return a checkpoint under the model's names, see `wrappers`, and what does not fit then."""
    leaves = flatten(template).items()
    expected = {name for path, leaf in leaves for name in table.find(path, leaf.shape)[1]}
    allowed = (*table.buffers, *table.ignored)
    state = wrappers.unwrapped(state, expected, lambda name: _matches(name, allowed))
    return state, check(state, table, template)


def check(state: Mapping[str, Any], table: RuleTable, template: Mapping[str, Any]) -> Problems:
    """Compare a checkpoint's names, shapes and types with a model, without reading data.

    `state` maps torch names, and the nested `template` our parameters, to anything with `shape` and
    `dtype`: lazy tensors, arrays, or what `jax.eval_shape` gives.
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
                mismatched.append(f"{name}: {shown(have)} in the checkpoint, {wanted} in the model")
            elif _is_float(leaf.dtype) and not _is_float(state[name].dtype):
                mismatched.append(
                    f"{name}: {state[name].dtype} in the checkpoint, {leaf.dtype} in the model"
                )
    allowed = (*table.buffers, *table.ignored)
    unexpected = [n for n in state if n not in expected and not _matches(n, allowed)]
    return Problems(tuple(missing), tuple(unexpected), tuple(mismatched))


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def flax_arrays(state: Mapping[str, Any], table: RuleTable, template: Mapping[str, Any]) -> Tensors:
    """Return a PyTorch checkpoint as our arrays by path, in the checkpoint's own dtypes.

    Each read gives a new contiguous array. A checkpoint that does not fit (see `check`) raises
    CheckpointMismatch.
    """
    path = getattr(state, "path", "")
    state, problems = fit(state, table, template)
    if problems:
        raise CheckpointMismatch(table.model, problems, path=path)

    def array(path: str, leaf: Any) -> LazyTensor:
        shape = tuple(leaf.shape)
        rule, names = table.find(path, shape)
        dtype = jnp.result_type(*(state[name].dtype for name in names)) if names else leaf.dtype

        def load(index: Index) -> np.ndarray:
            out = np.empty(part_shape(index), dtype)
            for i, inner, place in rule.sources(shape, index):
                out[place] = rule.transform.to_flax(state[names[i]][inner])
            return out

        return LazyTensor(path, shape, dtype, lambda: load(whole(shape)), load)

    return {path: array(path, leaf) for path, leaf in flatten(template).items()}


def to_flax(
    state: Mapping[str, Any], table: RuleTable, template: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a whole checkpoint as our parameter tree, in the dtypes of the template."""
    arrays, leaves = flax_arrays(state, table, template), flatten(template)
    return unflatten({p: t.read().astype(leaves[p].dtype, copy=False) for p, t in arrays.items()})


def torch_tensors(arrays: Mapping[str, LazyTensor], table: RuleTable) -> Tensors:
    """Return our arrays as PyTorch's tensors by name: the inverse of `flax_arrays`.

    The tensors of one array follow each other, and the array is read once for all of them.
    """
    found = {path: table.find(path, array.shape) for path, array in arrays.items()}
    count = collections.Counter(name for _, names in found.values() for name in names)
    twice = sorted(name for name, times in count.items() if times > 1)
    if twice:
        raise ValueError(f"{table.model}: several parameters would become {shown(twice)}")
    last: dict[str, list[np.ndarray]] = {}

    def views(path: str) -> list[np.ndarray]:
        if path not in last:
            last.clear()  # before the next one is read
            rule, array = found[path][0], arrays[path]
            last[path] = [rule.transform.to_torch(view) for view in rule.views(array.read())]
        return last[path]

    return {
        name: LazyTensor(
            name,
            rule.torch_shape(arrays[path].shape),
            arrays[path].dtype,
            lambda path=path, i=i: views(path)[i],
        )
        for path, (rule, names) in found.items()
        for i, name in enumerate(names)
    }
