"""An order of items in which neighbours stay close, for storage where random access is slow."""

import functools
from collections.abc import Callable

import numpy as np


def block_order(
    count: int,
    block: int,
    window: int,
    seed: int,
    announce: Callable[[int, np.ndarray], None] = lambda place, items: None,
) -> Callable[[int], int]:
    """Return the function from a place to its item, each epoch another order of all items.

    Blocks of `block` neighbours are shuffled, and as many as have `window` items together are mixed
    at a time: so many places in a row need only these parts of the data. The blocks begin elsewhere
    in every epoch. `announce` is told the first place and the items of every mix that is made.
    """
    whole, together = count // block, max(1, window // block)

    @functools.lru_cache(2)
    def blocks(epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng((seed, epoch))
        return np.append(rng.permutation(whole), whole), int(rng.integers(count))

    @functools.lru_cache(4)
    def mixed(epoch: int, number: int) -> np.ndarray:
        order, shift = blocks(epoch)
        some = order[number * together : (number + 1) * together]
        items = (some[:, None] * block + np.arange(block)).ravel()
        rng = np.random.default_rng((seed, epoch, number))
        items = (rng.permutation(items[items < count]) + shift) % count
        announce(epoch * count + number * together * block, items)
        return items

    def item(place: int) -> int:
        epoch, within = divmod(place, count)
        number, within = divmod(within, together * block)
        return int(mixed(epoch, number)[within])

    return item
