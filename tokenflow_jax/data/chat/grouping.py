"""An order of samples in which those of a batch are alike in length and kind.

The reference's sampler, with the random permutations as an argument: picture and text samples are
shuffled apart, cut into mega-batches (all samples of one optimizer step), sorted by length within
them and dealt to the ranks; then mega-batches of both kinds are shuffled together.
"""

from collections.abc import Callable, Sequence

import numpy as np

Permute = Callable[[int], Sequence[int] | np.ndarray]  # n -> a permutation of range(n)


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deal each index to the chunk that is shortest so far; strided if they do not divide."""
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
    lengths_N: np.ndarray, batch_size: int, world_size: int, permute: Permute
) -> np.ndarray:
    order_N, mega = np.asarray(permute(len(lengths_N)), np.int64), batch_size * world_size
    # Longest first within each mega-batch; ties as they were drawn.
    order_N = order_N[np.lexsort((-lengths_N[order_N], np.arange(len(order_N)) // mega))]
    if world_size == 1:
        return order_N
    result: list[int] = []
    for start in range(0, len(order_N), mega):
        batch = order_N[start : start + mega].tolist()
        result += [i for chunk in even_chunks(batch, lengths_N, world_size) for i in chunk]
    return np.array(result, np.int64)


def grouped_order(
    lengths: Sequence[int] | np.ndarray, batch_size: int, world_size: int, permute: Permute
) -> np.ndarray:
    """Return the order of one epoch, a permutation of the samples, int64.

    Lengths are positive with a picture, negative without. `permute` is called for pictures, for
    texts and for mega-batches, in this order; once where all samples are of one kind.
    """
    lengths_N = np.asarray(lengths, np.int64)
    zeros = np.flatnonzero(lengths_N == 0)
    if len(zeros):
        raise ValueError(
            f"samples {zeros[:5].tolist()} have length 0, whose sign cannot tell their kind"
        )
    kinds = [np.flatnonzero(lengths_N > 0), np.flatnonzero(lengths_N < 0)]
    if not all(map(len, kinds)):
        return _by_length(lengths_N, batch_size, world_size, permute)
    mega, whole, rest = batch_size * world_size, [], []
    for members in kinds:
        order = members[_by_length(np.abs(lengths_N[members]), batch_size, world_size, permute)]
        last = (len(order) - 1) // mega * mega  # where the last mega-batch begins
        whole.append(order[:last].reshape(-1, mega))
        rest.append(order[last:])
    # The last mega-batches, which may be short, are joined at the end in the order of indices.
    batches = np.concatenate(whole)
    shuffled = batches[np.asarray(permute(len(batches)), np.int64)]
    return np.concatenate([shuffled.reshape(-1), np.sort(np.concatenate(rest))])
