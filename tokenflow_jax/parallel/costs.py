"""Costs of a program before it runs: operations, memory held at once, bytes between devices."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def flops(jaxpr: jex_core.Jaxpr) -> float:
    """Count the operations of all matrix products and convolutions, over all devices.

    The traced program is counted, so recomputation counts, and a scan's body as often as it runs
    (XLA's own count takes it once). A multiplication and an addition are two.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            # Each output cell is a product with the kernel; zeros put between inputs cost nothing.
            kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            depth = kernel[spec[1]] * math.prod(kernel[axis] for axis in spec[2:])
            work = 2 * math.prod(equation.outvars[0].aval.shape) * depth
            total += work / math.prod(params["lhs_dilation"])
        elif name == "scan":
            total += params["length"] * flops(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(flops(branch.jaxpr) for branch in params["branches"])
        elif name == "shard_map":
            total += params["mesh"].size * flops(params["jaxpr"])
        else:
            total += sum(flops(inner) for inner in _inner_jaxprs(params))
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


_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d+(?:[a-z]\d\w*)?|pred)\[([\d,]*)\]")
_FUSED = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r"\b(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of a compiled program: kind -> (times, bytes of results per device).

    `hlo` is `compiled.as_text()`. A loop counts as often as its condition's constant says. A gather
    that the compiler writes as the sum of parts padded with zeros is an all-reduce here, too.
    """
    bodies, entry = _computations(hlo)
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    def visit(name: str, times: int, fused: set[str] | None = None) -> None:
        """Add up a computation; `fused` are the channels met in fusions of its caller."""
        own: set[str] = set()
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                channel = _CHANNEL.search(line)
                if fused is not None and channel:
                    # One that overlaps other work appears in every fusion that it overlaps.
                    if channel[1] in fused:
                        continue
                    fused.add(channel[1])
                sizes = [_array_bytes(*array) for array in _ARRAY.findall(found[1])]
                # A start's result holds its operands too: the results are the larger half.
                nbytes = max(sizes, default=0) if found[3] else sum(sizes)
                totals[found[2]][0] += times
                totals[found[2]][1] += times * nbytes
                continue
            if called := _FUSED.search(line):
                visit(called[1], times, own if fused is None else fused)
            elif " while(" in line:
                called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
                limits = _LIMIT.findall("\n".join(bodies.get(called["condition"], ())))
                visit(called["body"], times * max(map(int, limits), default=1))
            elif " conditional(" in line or " call(" in line:
                names = _CALLED.findall(line)
                for group in _BRANCHES.findall(line):
                    names += [n.strip().lstrip("%") for n in group.split(",")]
                for called in names:
                    visit(called, times)

    visit(entry, 1)
    return {kind: (times, nbytes) for kind, (times, nbytes) in sorted(totals.items())}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # others end attributes of several lines
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _array_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    count = math.prod(int(n) for n in shape.split(",") if n)
    return count * bits // 8
