"""The order of samples in which those of a batch are alike in length and in kind.

The reference's sampler, with the random permutations as an argument: picture and text samples are
shuffled apart, cut into mega-batches (all that one optimiser step takes), sorted by length within
them and dealt to the ranks; then mega-batches of both kinds are shuffled together.
"""

from collections.abc import Callable, Sequence

import numpy as np

Permute = Callable[[int], Sequence[int]]  # n -> a permutation of range(n)


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deals indices to ranks so that their lengths add up to about the same.

    Args:
      indices: in the order of dealing.
      lengths: of all samples, by index.
      chunks: how many ranks.

    Returns:
      For each rank its indices: always to the one with the least so far; strided where the number
      of indices does not divide.
    """
    if len(indices) % chunks:
        return [list(indices[rank::chunks]) for rank in range(chunks)]
    room = len(indices) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for index in indices:
        rank = totals.index(min(totals))
        dealt[rank].append(index)
        totals[rank] = float("inf") if len(dealt[rank]) == room else totals[rank] + lengths[index]
    return dealt


def _by_length(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    order, mega = list(permute(len(lengths))), batch_size * world_size
    result: list[int] = []
    for start in range(0, len(order), mega):
        batch = sorted(order[start : start + mega], key=lambda i: lengths[i], reverse=True)
        result += [i for chunk in even_chunks(batch, lengths, world_size) for i in chunk]
    return result


def grouped_order(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    """The order of one epoch.

    Args:
      lengths: of each sample, for example in words; positive with a picture, negative without.
      batch_size: samples of a rank and step.
      world_size: ranks.
      permute: called for pictures, for texts and for mega-batches, in this order; once where all
        samples are of one kind.

    Returns:
      A permutation of the samples. The last mega-batch of each kind, which may be short, are
      joined at the end in the order of their indices.

    Raises:
      ValueError: a length of zero.
    """
    zeros = [i for i, length in enumerate(lengths) if length == 0]
    if zeros:
        raise ValueError(f"samples {zeros[:5]} have length 0, whose sign cannot tell their kind")
    kinds = [
        [i for i, n in enumerate(lengths) if n > 0],
        [i for i, n in enumerate(lengths) if n < 0],
    ]
    if not all(kinds):
        return _by_length(lengths, batch_size, world_size, permute)
    mega, whole, rest = batch_size * world_size, [], []
    for members in kinds:
        own = [abs(lengths[i]) for i in members]
        order = [members[i] for i in _by_length(own, batch_size, world_size, permute)]
        batches = [order[start : start + mega] for start in range(0, len(order), mega)]
        whole += batches[:-1]
        rest += batches[-1]
    shuffled = [whole[i] for i in permute(len(whole))]
    return [i for batch in shuffled for i in batch] + sorted(rest)


def random_permutations(seed: Sequence[int]) -> Permute:
    """Permutations that depend on the seed and on how many were drawn before."""
    rng = np.random.default_rng(seed)
    return lambda count: rng.permutation(count).tolist()
