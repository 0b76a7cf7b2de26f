"""Costs of a traced program: operations, and memory held at once."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np
from jax.interpreters import partial_eval

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


class Operations(NamedTuple):
    """Floating-point operations over all devices; a multiplication and an addition are two."""

    computed: float = 0.0  # of all matrix products and convolutions, recomputation included
    # Of them, what a model needs without recomputation, and attention only where its mask allows.
    needed: float = 0.0
    kernels: float = 0.0  # of those computed, in kernels, whose time no compiler estimates

    def times(self, n: float) -> "Operations":
        return Operations(*(n * count for count in self))

    def plus(self, other: "Operations") -> "Operations":
        return Operations(*map(sum, zip(self, other, strict=True)))


def attention_scope(keys: float, length: int) -> str:
    """Return the name of the scope that attention is traced in, for `operations` to count it.

    `keys` are those that a query may read on average, of `length`.
    """
    return f"attention_{keys:.1f}_of_{length}"


_SCOPE = re.compile(r"attention_([\d.]+)_of_(\d+)")


def operations(jaxpr: jex_core.Jaxpr, scopes: str = "") -> Operations:
    """Count the operations of a traced program.

    A scan's body counts as often as it runs (XLA's own count takes it once). Kernels of attention
    count the pairs of query and key that the mask allows, padding and shared rows left out.
    """
    if not scopes:  # what nothing reads is traced, too: kernels whose results are kept
        jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = Operations()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        names = f"{scopes}/{equation.source_info.name_stack}"
        if name in ("dot_general", "conv_general_dilated"):
            found, count = _SCOPE.search(names), _product(equation)
            share = float(found[1]) / float(found[2]) if found else 1.0
            needed = 0.0 if "rematted_computation" in names else count * share
            total = total.plus(Operations(count, needed))
        elif _SCOPE.search(names) and (count := _attention(equation, names)):
            total = total.plus(count)
        elif name == "pallas_call":
            body = operations(params["jaxpr"], names).computed * math.prod(
                params["grid_mapping"].grid
            )
            needed = 0.0 if "rematted_computation" in names else body
            total = total.plus(Operations(body, needed, body))
        elif name == "scan":
            total = total.plus(operations(params["jaxpr"].jaxpr, names).times(params["length"]))
        elif name == "cond":
            branches = [operations(branch.jaxpr, names) for branch in params["branches"]]
            total = total.plus(max(branches))
        else:
            parts = params["mesh"].size if name == "shard_map" else 1  # one device's share each
            for inner in _inner_jaxprs(params):
                total = total.plus(operations(inner, names).times(parts))
    return total


def _product(equation: jex_core.JaxprEqn) -> float:
    params, cells = equation.params, math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * cells * math.prod(shape[axis] for axis in contracted)
    # Each output cell is a product with the kernel; zeros put between inputs cost nothing.
    kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
    depth = kernel[spec[1]] * math.prod(kernel[axis] for axis in spec[2:])
    return 2 * cells * depth / math.prod(params["lhs_dilation"])


def _attention(equation: jex_core.JaxprEqn, names: str) -> Operations | None:
    """Count a kernel of attention, None for another equation.

    Each of its products is 2 operations for every channel of the queries and key that it reads.
    """
    name = equation.primitive.name
    if name == "pallas_call":
        products = max(_count_products(equation.params["jaxpr"]), 1)
    elif name.startswith("dot_product_attention"):  # cuDNN's; going back it makes the scores again
        products = 5 if "bwd" in name else 2
    else:
        return None
    queries = max(math.prod(v.aval.shape) for v in equation.invars if len(v.aval.shape) > 2)
    pair = 2 * queries * float(_SCOPE.search(names)[1])
    computed = pair * products
    # Needed are two products, and four for the gradient, of which a kernel may make more or less.
    forward = "transpose" not in names
    needed = pair * (6 if "jvp" in names else 2) if forward else 0.0
    return Operations(computed, needed, computed)


def _count_products(jaxpr: jex_core.Jaxpr) -> int:
    """Count the matrix products of a kernel's body, of branches those of the longest."""
    total = 0
    for equation in jaxpr.eqns:
        branches = [_count_products(b.jaxpr) for b in equation.params.get("branches") or ()]
        total += equation.primitive.name == "dot_general"
        total += max(branches, default=0)
        total += sum(map(_count_products, _inner_jaxprs(equation.params)))
    return total


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[jex_core.Jaxpr]:
    inner = next((params[name] for name in _INNER if params.get(name) is not None), None)
    if inner is not None:
        yield inner.jaxpr if isinstance(inner, jex_core.ClosedJaxpr) else inner


def live_bytes(jaxpr: jex_core.Jaxpr) -> float:
    """Estimate from above the bytes of intermediate values alive at once, as if nothing were fused.

    Arguments and results do not count.
    """
    last = {  # the last equation that reads a variable
        var: i
        for i, equation in enumerate(jaxpr.eqns)
        for var in equation.invars
        if isinstance(var, jex_core.Var)
    }
    results = {var for var in jaxpr.outvars if isinstance(var, jex_core.Var)}
    alive: dict[Any, int] = {}
    now = peak = 0.0
    for i, equation in enumerate(jaxpr.eqns):
        params = equation.params
        branches = params.get("branches") or ()
        inner = [b.jaxpr for b in branches] or list(_inner_jaxprs(params))
        peak = max(peak, now + max((live_bytes(j) for j in inner), default=0.0))
        for var in equation.outvars:
            if var not in results and var in last:
                alive[var] = _nbytes(var.aval)
                now += alive[var]
        peak = max(peak, now)
        dying = [var for var in alive if last[var] == i]
        now -= sum(alive.pop(var) for var in dying)
    return peak


def _nbytes(aval: Any) -> int:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def shard_bytes(tree: Any) -> int:
    """Return the bytes per device of shapes that carry a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
