"""Several data sets of conversations as one."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.data.examples import Skipped
from tokenflow_jax.data.mixture import Mixed, Plan


class MixedConversations:
    """Data sets with the interface of one of `Conversations`; pictures are named "SET/name"."""

    def __init__(self, sets: Mapping[str, Conversations], weights: Sequence[float]):
        self.sets, self.weights = list(sets.values()), list(weights)
        self.config = self.sets[0].config
        if any(own.config.order != "random" for own in self.sets):
            raise ValueError("data.order of a mixture must be 'random': its sources have no groups")
        self._mixed = Mixed([own.row for own in self.sets], [len(own) for own in self.sets])
        self.counts = dict(zip(sets, self._mixed.counts, strict=True))
        self.name = "mixture"
        self.skipped = Skipped(self.name, len(self), "conversations")  # each set counts its own

    def __len__(self) -> int:
        return sum(self.counts.values())

    def row(
        self, index: int, rng: np.random.Generator | None = None
    ) -> tuple[dict[str, np.ndarray], str] | None:
        """Return the tokens of a sample and the name of its picture; None where it is broken."""
        source, number = self._mixed.locate(index)
        found = self.sets[source].row(number, rng)
        return found and (found[0], f"{source}/{found[1]}" if found[1] else "")

    def image(self, image: str, label: str = "") -> np.ndarray | None:
        source, name = image.split("/", 1)
        return self.sets[int(source)].image(name, label)

    def is_broken(self, image: str) -> bool:
        source, _, name = image.partition("/")
        return bool(image) and name in self.sets[int(source)].broken_images

    @functools.cached_property
    def image_places(self) -> dict[str, int]:
        """The names of all pictures with their places in `images`."""
        return {name: place for place, name in enumerate(self.images)}

    @property
    def images(self) -> list[str]:
        return [f"{i}/{name}" for i, own in enumerate(self.sets) for name in own.images]

    def label(self, index: int) -> str:
        source, number = self._mixed.locate(index)
        return self.sets[source].label(number)

    def source_of(self, index: int) -> int:
        """Return the place of a sample's data set among `sets`."""
        return self._mixed.locate(index)[0]

    def sample_at(self, place: int, plan: Plan, seed: int, batch_size: int) -> int:
        """Return the sample at a place of the endless stream that a plan deals."""
        source, number = plan.at(place)
        return self._mixed.first(source) + self.sets[source].sample_at(
            number, None, seed + source, batch_size
        )

    def skipped_in(self) -> str:
        """Return what was left out so far, in words."""
        return "; ".join(own.skipped_in() for own in self.sets)

    def notes(self) -> list[str]:
        """Return a line on each data set that left something out."""
        return [note for own in self.sets for note in own.notes()]
