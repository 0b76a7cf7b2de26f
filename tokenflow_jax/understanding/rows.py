"""Rows of conversations and the features of their pictures, in few shapes."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tokenflow_jax.data.chat import insertion

_ROUND = 64  # rows are padded to a multiple, so that few programs are compiled


def padded(rows: Sequence[Mapping[str, np.ndarray]], side: str = "right") -> dict[str, np.ndarray]:
    """Stack rows, padded to one of few lengths; see `insertion.pad_rows`."""
    longest = max(len(row["ids"]) for row in rows)
    return insertion.pad_rows(rows, -(-longest // _ROUND) * _ROUND, side)


def features(
    found: Iterable[np.ndarray], counts: Sequence[int], vectors: int, channels: int
) -> np.ndarray:
    """Deal pictures' features (N, C) to rows that have `counts`: float32 (B, M, N, C), M > 0."""
    out = np.zeros((len(counts), max([1, *counts]), vectors, channels), np.float32)
    rest = iter(found)
    for row, count in enumerate(counts):
        for place in range(count):
            out[row, place] = next(rest)
    return out
