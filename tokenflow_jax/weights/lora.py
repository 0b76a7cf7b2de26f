"""LoRA (arXiv 2106.09685): small matrices beside a frozen decoder's kernels train in their place.

A kernel W (in, out) computes as W + alpha / rank * A B with A (in, rank), B (rank, out), and B = 0
at first; A and B are `kernel_lora_a` and `kernel_lora_b` beside it. qwix adds them to the layers.
Frozen weights are held in the dtype of the computation, or quantized (QLoRA, arXiv 2305.14314).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.weights import quantized
from tokenflow_jax.weights.lazy import LazyTensor
from tokenflow_jax.weights.quantized import KINDS, LAYERS, LINEAR, is_quantized
from tokenflow_jax.weights.rules import Tensors, flatten, unflatten

PyTree = Any
FLOATS = ("auto", "float32", "bfloat16")
_ADAPTER = re.compile(r"_lora_[ab]$")
# Frozen norms stay float32, because they compute in it.
_STORED = ("kernel", "embedding", "bias")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Options of low-rank adapters; rank 0 is none."""

    rank: int = 0
    alpha: float = 16.0  # adapters are scaled by alpha / rank
    modules: tuple[str, ...] = ()  # names or patterns of LINEAR; () all of them
    weights: str = "auto"  # frozen ones as: auto (compute dtype), float32, bfloat16, or KINDS

    def __post_init__(self):
        object.__setattr__(self, "modules", tuple(self.modules))
        problems, known = [], (*FLOATS, *KINDS)
        if self.rank < 0 or not self.alpha > 0:
            problems.append(f"rank={self.rank}, alpha={self.alpha}: 0 or more, and above 0")
        if self.weights not in known:
            problems.append(f"weights={self.weights!r} is not one of {', '.join(known)}")
        if not self.rank and (self.modules or self.weights != "auto"):
            problems.append("modules and weights need a rank above 0")
        for pattern in self.modules:
            try:
                if not any(map(functools.partial(_matches, pattern), LINEAR)):
                    problems.append(f"modules: {pattern!r} matches none of {', '.join(LINEAR)}")
            except re.error as error:
                problems.append(f"modules: {pattern!r} is no regular expression ({error})")
        if problems:
            raise ValueError("config.lora: " + "; ".join(problems))

    def adapted(self, layer: str) -> bool:
        """Tell whether one of LINEAR has an adapter."""
        return not self.modules or any(_matches(pattern, layer) for pattern in self.modules)

    @property
    def kind(self) -> str:
        """How the frozen kernels are quantized; "" is not at all."""
        return self.weights if self.weights in KINDS else ""


def _matches(pattern: str, layer: str) -> bool:
    return bool(re.fullmatch(pattern, layer) or re.fullmatch(pattern, layer.split("/")[-1]))


def is_adapter(name: str) -> bool:
    """Tell the path of an adapter's matrix."""
    return bool(_ADAPTER.search(name))


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a run, and what else trains beside them.

    `take`, `put` and `join` are as in `optim.Whole`: the optimizer sees what trains only.
    """

    config: LoraConfig
    trainable: tuple[str, ...]  # patterns of parameters that train as they are
    dtype: Any  # of the computation

    def model(self, model: Any) -> Any:
        """Return the model with adapters, whose `init` makes them, too."""
        qwix = quantized.import_qwix()
        config, rules = self.config, []
        for layer in LINEAR:
            options = quantized.settings(model.config.lm, layer, config.kind)
            if config.adapted(layer):
                rules.append(qwix.LoraRule(rank=config.rank, alpha=config.alpha, **options))
            elif config.kind:
                rules.append(qwix.QuantizationRule(**options))
        return qwix.quantize_model(model, qwix.LoraProvider(rules), methods=model.runs_decoder)

    def trains(self, name: str) -> bool:
        """Tell whether the parameter of a path trains."""
        return is_adapter(name) or any(re.match(pattern, name) for pattern in self.trainable)

    def init(self, model: Any, key: jax.Array) -> PyTree:
        """Return random weights of what `model` gave: adapters float32, frozen ones as kept."""
        params = model.clone(dtype=jnp.float32).init_params(key)  # else qwix mixes dtypes
        self._check(params)
        kept = self.config.weights
        kept = jnp.dtype(kept if kept in FLOATS[1:] else self.dtype)

        def leaf(name: str, leaf: Any) -> Any:
            if is_quantized(leaf):  # a scale's dtype is that of the kernels that are computed with
                return quantized.stored(leaf.replace(array=leaf.array.astype(self.dtype)))
            fixed = name.endswith(_STORED) and not self.trains(name)
            return leaf.astype(kept) if fixed else leaf

        return unflatten({name: leaf(name, x) for name, x in flatten(params).items()})

    def _check(self, params: PyTree) -> None:
        """Raise ValueError for patterns that match nothing, or what cannot train."""
        names, problems = flatten(params), []
        for pattern in self.trainable:
            found = [name for name in names if re.match(pattern, name)]
            fixed = [name for name in found if is_quantized(names[name])]
            if not found:
                problems.append(f"trainable: no parameter matches {pattern!r}")
            if fixed:
                problems.append(f"trainable: {pattern!r} matches {fixed[0]}, which is quantized")
        if problems:
            raise ValueError("; ".join(problems))

    def take(self, params: PyTree) -> PyTree:
        """Return the parameters that train."""
        return unflatten({n: x for n, x in flatten(params).items() if self.trains(n)})

    def put(self, params: PyTree, trained: PyTree) -> PyTree:
        """Replace the parameters that train."""
        return unflatten(flatten(params) | flatten(trained))

    def join(self, params: PyTree, trained: PyTree) -> PyTree:
        """Return what the model computes with: adapters in the dtype of the computation."""

        def leaf(name: str, leaf: Any) -> Any:
            if is_quantized(leaf):
                return quantized.used(leaf)
            return leaf.astype(self.dtype) if is_adapter(name) else leaf

        flat = flatten(self.put(params, trained))
        return unflatten({name: leaf(name, x) for name, x in flat.items()})


def merged(arrays: Mapping[str, LazyTensor], options: Mapping[str, Any]) -> Tensors:
    """Return the plain weights (float32 where merged) of a LoRA run's arrays by path.

    `options` are config.lora of the run.
    """
    config = LoraConfig(**options)
    kernels = {f"{LAYERS}/{layer}/kernel" for layer in LINEAR}
    plain = {
        name: tensor
        for name, tensor in arrays.items()
        if not is_adapter(name) and not name.endswith(quantized.ARRAYS)
    }
    for name in sorted(kernels):
        parts = {n.removeprefix(name): t for n, t in arrays.items() if n.startswith(name)}
        if set(parts) == {""}:
            continue  # neither quantized nor adapted
        shape = parts.get("", parts.get("/array/qvalue")).shape
        load = functools.partial(_merge, parts, config)
        plain[name] = LazyTensor(name, shape, np.dtype(np.float32), load)
    return plain


def _merge(parts: Mapping[str, LazyTensor], config: LoraConfig) -> np.ndarray:
    if config.kind:
        qvalue, scale = (parts[f"/{part}"].read() for part in quantized.ARRAYS)
        kernel = quantized.dequantize(qvalue, scale, config.kind)
    else:
        kernel = parts[""].read().astype(np.float32)
    if "_lora_a" in parts:
        a, b = (parts[f"_lora_{part}"].read().astype(np.float32) for part in "ab")
        kernel = kernel + (a @ b) * np.float32(config.alpha / config.rank)
    return kernel
