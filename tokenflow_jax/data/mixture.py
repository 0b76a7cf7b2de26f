"""Mixtures of data sets: which example of which data set stands at a place of the stream.

Places are dealt in blocks, each with the same number of every source and in an order of its own. So
the source of a place, and how many of its examples came before, follow from the place alone.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from tokenflow_jax.log import log
from tokenflow_jax.messages import shown

BLOCK = 4096  # places; weights are rounded to that
_FORM = (
    "'WEIGHT NAME PATH [key=value ...]', such as '0.7 webdataset DIR/{000..099}.tar min_side=64'"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture, as its line says."""

    weight: float  # relative to those of the others
    name: str  # of the kind of data, as data.name
    path: str
    label: str  # for curves and logs
    changes: Mapping[str, Any]  # of the other keys of config.data, for this source


def parse(lines: Sequence[str], known: Mapping[str, Any]) -> list[Source]:
    """Parse the lines of `data.mixture`; `known` are the keys of config.data with their values.

    The key `as` names the source in curves; by default it is its kind and number.

    Raises:
      ValueError: a line is not of the form, or has an unknown key or a wrong value.
    """
    sources, keys = [], {*known, "as"} - {"name", "path", "mixture"}
    if len(lines) > BLOCK // 2:
        raise ValueError(f"data.mixture has {len(lines):,} sources, the limit is {BLOCK // 2:,}")
    for number, line in enumerate(lines, 1):
        where = f"data.mixture, line {number} {shown(line)}"
        try:
            weight, name, *rest = shlex.split(line)
            weight = float(weight)
        except (ValueError, AttributeError, TypeError):
            raise ValueError(f"{where}: write {_FORM}") from None
        if not 0 < weight < np.inf:
            raise ValueError(f"{where}: its weight must be above 0")
        path = "" if not rest or _sets(rest[0], keys) else rest.pop(0)
        changes = dict(word.split("=", 1) for word in rest if "=" in word)
        label = changes.pop("as", f"{name}_{number}")
        if unknown := [word for word in rest if word.split("=")[0] not in keys]:
            raise ValueError(f"{where}: {shown(unknown[0])} sets none of {', '.join(sorted(keys))}")
        if not label:
            raise ValueError(f"{where}: as= needs a name")
        values = {key: _like(known[key], text, f"{where}: {key}") for key, text in changes.items()}
        sources.append(Source(weight, name, path, label, values))
    labels = [source.label for source in sources]
    if len({*labels}) < len(labels):
        raise ValueError(f"data.mixture: the names {shown(labels)} are not different; give as=NAME")
    return sources


def _sets(word: str, keys: Set[str]) -> bool:
    """Tell key=value from a path, which may have folders such as year=2024."""
    key, equals, _ = word.partition("=")
    return bool(equals) and (key in keys or "/" not in word)


def settings(data: Any) -> dict[str, tuple[float, Any]]:
    """Return weight and settings of every source of config.data; one, named "", without a mixture.

    Settings are config.data itself, with what a source's line changes.
    """
    if (data.name == "mixture") != bool(data.mixture):
        raise ValueError(
            "data.name=mixture and data.mixture, a line for each source, go together: " + _FORM
        )
    if not data.mixture:
        return {"": (1.0, data)}
    known = data.to_dict()
    return {
        source.label: (
            source.weight,
            type(data)({**known, **source.changes, "name": source.name, "path": source.path}),
        )
        for source in parse(data.mixture, known)
    }


def from_settings(kind: type, data: Any, **given: Any) -> Any:
    """Return a dataclass made of the settings of a data set, as far as it has them, and others."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in data]
    values = {name: data[name] for name in names}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**values | given)


def _like(known: Any, text: str, where: str) -> Any:
    """Return a value of the type of the one that it replaces."""
    try:
        if isinstance(known, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(known, tuple | list):
            return tuple(part for part in text.split("|") if part)
        return type(known)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{where} is {shown(text)}, not like {known!r}") from None


class Plan:
    """The places of a stream from one on, dealt to sources by weights."""

    def __init__(
        self, weights: Sequence[float], seed: int, origin: int = 0, starts: Sequence[int] = ()
    ):
        """Deal from place `origin` on, where source s has given `starts[s]` examples before."""
        self.weights, self._seed, self.origin = [float(w) for w in weights], seed, origin
        self.starts = list(starts) or [0] * len(self.weights)
        self.counts = _shares(self.weights)

    @functools.lru_cache(8)  # noqa: B019 - a plan lives as long as its run
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place of a block, and how many of it came before."""
        rng = np.random.default_rng((self._seed, self.origin, block))
        sources = rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        before = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            before[sources == source] = np.arange(count)
        return sources, before

    def at(self, place: int) -> tuple[int, int]:
        """Return the source of a place, and the number of the example among all of that source."""
        block, within = divmod(place - self.origin, BLOCK)
        sources, before = self._block(block)
        source = int(sources[within])
        return source, self.starts[source] + block * self.counts[source] + int(before[within])

    def places(self, source: int, first: int, count: int) -> np.ndarray:
        """Return the places of some examples of a source, numbered as `at` does."""
        numbers = np.arange(first, first + count) - self.starts[source]
        blocks, within = np.divmod(numbers, self.counts[source])
        found = np.full(count, -1, np.int64)  # -1: before the origin
        for block in np.unique(blocks[blocks >= 0]):
            own = np.flatnonzero(self._block(int(block))[0] == source)
            here = blocks == block
            found[here] = self.origin + block * BLOCK + own[within[here]]
        return found

    def given(self, place: int) -> list[int]:
        """Return how many examples each source has given before a place."""
        block, within = divmod(place - self.origin, BLOCK)
        passed = self._block(block)[0][:within]
        more = np.bincount(passed, minlength=len(self.counts))
        each = zip(self.starts, self.counts, more, strict=True)
        return [start + block * count + int(extra) for start, count, extra in each]

    def state(self) -> dict[str, Any]:
        """Return what `resumed` needs, JSON-able."""
        return {"weights": self.weights, "origin": self.origin, "starts": self.starts}

    def resumed(self, state: Mapping[str, Any], place: int) -> "Plan":
        """Return the plan of a state or, where its weights were others, this one from `place` on.

        `place` is the first that nobody has passed.
        """
        saved = Plan(state["weights"], self._seed, state["origin"], state["starts"])
        if saved.weights == self.weights:
            return saved
        log.info("weights of the mixture %s -> %s", saved.weights, self.weights)
        return Plan(self.weights, self._seed, place, saved.given(place))


def _shares(weights: Sequence[float]) -> list[int]:
    """Return how many places of a block each source has: at least one, by largest remainder."""
    exact = np.asarray(weights, np.float64)
    exact = exact / exact.max()  # before the sum, which may be beyond all numbers
    exact = exact / exact.sum() * (BLOCK - len(exact))
    counts = np.floor(exact).astype(int)
    for source in np.argsort(counts - exact, kind="stable")[: BLOCK - len(exact) - counts.sum()]:
        counts[source] += 1
    return [int(count) + 1 for count in counts]


class Mixed:
    """Several data sets as one: their items are numbered through."""

    def __init__(self, makes: Sequence[Callable[..., Mapping[str, Any] | None]], counts: Sequence):
        """Join data sets of `counts` items, each with its function that makes an example."""
        self.counts, self._makes = list(counts), list(makes)
        self._firsts = np.concatenate([[0], np.cumsum(counts)])

    def locate(self, item: int) -> tuple[int, int]:
        """Return the data set of an item, and the item's number there."""
        source = int(np.searchsorted(self._firsts, item, side="right")) - 1
        return source, int(item - self._firsts[source])

    def first(self, source: int) -> int:
        """Return the number of a data set's first item."""
        return int(self._firsts[source])

    def make(self, item: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """Return an example with its "source", or None for a broken one."""
        source, number = self.locate(item)
        made = self._makes[source](number, rng)
        return None if made is None else {**made, "source": np.int32(source)}

    def telling(self, tell: Sequence[Callable[[np.ndarray], None] | None]) -> Callable[..., None]:
        """Return the function that passes sorted items on to the data sets that want them."""

        def will_need(items: np.ndarray) -> None:
            ends = np.searchsorted(items, self._firsts)
            for source, begin, end in zip(range(len(tell)), ends, ends[1:], strict=False):
                if tell[source] and begin < end:
                    tell[source](items[begin:end] - self._firsts[source])

        return will_need
