"""What a compiled program's text tells: cycles that its compiler expects, bytes between devices."""

import dataclasses
import math
import re

_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
    r"\(([^)]*)\)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+(?:[a-z]\d\w*)?|pred)\[([\d,]*)\]")
_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(")
_FUSED = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")
_ASYNC = re.compile(r" async-start\(.*\bcalls=%?([\w.\-]+)")
_OFFLOADED = re.compile(r" custom-call\(.*\bcalled_computations=\{%?([\w.\-]+)")  # to SparseCores
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r"\b(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')  # GPUs; TPUs have it in the condition
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**62  # an instruction without an estimate has the largest integer, 2**63 - 1
_ROOT = re.compile(r"^\s*ROOT ")
_SYNCHRONOUS = re.compile(r'"is_sync":true')


@dataclasses.dataclass
class Costs:
    """Costs of one run of a program, per device."""

    # Of the instructions that a TPU's compiler estimates: neither kernels nor collectives.
    cycles: int = 0
    # kind -> (times, bytes of results). A gather that the compiler writes as the sum of parts
    # padded with zeros is an all-reduce here, too.
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    # Bytes that a device sends while it waits (synchronous collectives), and beside other work.
    waiting: int = 0
    beside: int = 0

    def add(self, kind: str, times: int, nbytes: int, sent: int, waited: bool) -> None:
        count, total = self.collectives.get(kind, (0, 0))
        self.collectives[kind] = (count + times, total + times * nbytes)
        if waited:
            self.waiting += times * sent
        else:
            self.beside += times * sent


def read(text: str) -> Costs:
    """Add up a program; a loop counts as often as it runs.

    `text` is what a compiler dumps, or `compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    costs = Costs()

    def visit(name: str, times: int, fused: set[str] | None = None) -> None:
        """Add up a computation; `fused` are the channels met in fusions of its caller."""
        own: set[str] = set()
        lines = bodies.get(name, ())
        types = {found[1]: found[2] for line in lines if (found := _DEFINED.match(line))}
        for line in lines:
            if found := _COLLECTIVE.search(line):
                channel = _CHANNEL.search(line)
                if fused is not None and channel:
                    # One that overlaps other work appears in every fusion that it overlaps.
                    if channel[1] in fused:
                        continue
                    fused.add(channel[1])
                _, kind, start, _ = found.groups()
                nbytes, sent = _sizes(found, types)
                waited = bool(_SYNCHRONOUS.search(line)) or not (start or fused is not None)
                if name.startswith("all-reduce-scatter"):  # a TPU's: a sum, of which a part stays
                    root = next(filter(_ROOT.search, lines))
                    kind, waited = "reduce-scatter", True
                    nbytes, sent = _array_bytes(*_ARRAY.search(root).groups()), nbytes
                costs.add(kind, times, nbytes, sent, waited)
                continue
            if fused is None and (cycles := _CYCLES.search(line)) and int(cycles[1]) < _UNKNOWN:
                costs.cycles += times * int(cycles[1])
            called = _FUSED.search(line) or _ASYNC.search(line) or _OFFLOADED.search(line)
            if called:
                visit(called[1], times, own if fused is None else fused)
            elif " while(" in line:
                called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
                limits = _TRIPS.findall(line) or _LIMIT.findall(
                    "\n".join(bodies.get(called["condition"], ()))
                )
                visit(called["body"], times * max(map(int, limits), default=1))
            elif " conditional(" in line or " call(" in line:
                names = _CALLED.findall(line)
                for group in _BRANCHES.findall(line):
                    names += [n.strip().lstrip("%") for n in group.split(",")]
                for called in names:
                    visit(called, times)

    visit(entry, 1)
    return costs


def _sizes(found: re.Match, types: dict[str, str]) -> tuple[int, int]:
    """Return the bytes of a collective's results, and about how many a device sends for them."""
    result, kind, start, operands = found.groups()
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(result)]
    if start and kind != "all-reduce":
        # The result of a start holds operands, results, and perhaps small counters at the end.
        arrays = [a for a in arrays if a > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    nbytes = sum(arrays)
    if kind == "all-reduce":
        return nbytes, 2 * nbytes  # in a ring: every part goes around to be summed, then to be read
    if kind == "reduce-scatter":
        names = re.findall(r"%([\w.\-]+)", operands)
        given = [_array_bytes(*a) for n in names for a in _ARRAY.findall(types.get(n, ""))]
        return nbytes, sum(given) or nbytes
    return nbytes, nbytes


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
