"""Places of image vectors among the tokens, in shapes that do not depend on the content.

A row of ids with image markers becomes a row of positions, each of which says where its input comes
from. With 3 vectors per image, padded to 8 on the right:

    ids of the tokens    5  IMAGE_ID     7   9
    ids                  5   0   0   0   7   9   0   0
    places              -1   0   1   2  -1  -1  -1  -1      vector of the row's images, -1: text
    segments             1   1   1   1   1   1   0   0      conversation of the row, 0: padding

A row's images are numbered on: the second one's vectors are 3, 4, 5. A row without a marker still
has an image, which nothing reads. Conversations that share a row (`join_rows`) are its segments:
each has its own image, and the model gives each positions from 0
(`understanding.model.positions_in`) and lets none read another.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tokenflow_jax.data.chat.templates import IGNORE, IMAGE_ID

TEXT = -1  # the place of a position without an image vector


def merge_row(
    ids_T: np.ndarray,  # without padding, IMAGE_ID at the markers
    labels_T: np.ndarray | None,  # None: IGNORE everywhere
    vectors: int | Sequence[int],  # per image, or one number for each marker
    max_length: int | None = None,  # cuts a longer row, possibly inside an image
) -> dict[str, np.ndarray]:
    """Replace the markers of one row by the places of image vectors: int32 (L,) arrays."""
    ids_T = np.asarray(ids_T, np.int32)
    labels_T = np.full(len(ids_T), IGNORE, np.int32) if labels_T is None else np.asarray(labels_T)
    markers = np.flatnonzero(ids_T == IMAGE_ID)
    counts = [vectors] * len(markers) if isinstance(vectors, int) else list(vectors)
    if len(counts) != len(markers):
        raise ValueError(f"{len(markers)} image markers, and images for {len(counts)}")
    repeats = np.ones(len(ids_T), int)
    repeats[markers] = counts
    source = np.repeat(np.arange(len(ids_T)), repeats)[:max_length]
    is_image = ids_T[source] == IMAGE_ID
    return {
        "ids": np.where(is_image, 0, ids_T[source]).astype(np.int32),
        "labels": np.where(is_image, IGNORE, labels_T[source]).astype(np.int32),
        "places": np.where(is_image, np.cumsum(is_image) - 1, TEXT).astype(np.int32),
    }


def join_rows(rows: Sequence[Mapping[str, np.ndarray]], vectors: int) -> dict[str, np.ndarray]:
    """Join rows of one image each; an empty row is left out but its image still counts."""
    parts = []
    for number, row in enumerate(rows):
        if not row:
            continue
        labels_L = row["labels"].copy()
        labels_L[:1] = IGNORE  # the token before belongs to another conversation
        places_L = np.where(row["places"] >= 0, row["places"] + number * vectors, TEXT)
        segments_L = np.full(len(labels_L), number + 1)
        parts.append({**row, "labels": labels_L, "places": places_L, "segments": segments_L})
    names = parts[0] if parts else ()
    return {n: np.concatenate([part[n] for part in parts]).astype(np.int32) for n in names}


def merged_length(ids_T: np.ndarray, vectors: int) -> int:
    """Return the length of a row of ids with `vectors` vectors per image."""
    return len(ids_T) + int((np.asarray(ids_T) == IMAGE_ID).sum()) * (vectors - 1)


def pad_rows(
    rows: Sequence[Mapping[str, np.ndarray]], length: int, side: str = "right"
) -> dict[str, np.ndarray]:
    """Stack rows, padded to one length: on the right for training, on the left for generation."""
    if side not in ("right", "left"):
        raise ValueError(f"padding side {side!r} is not one of ('right', 'left')")
    longest = max((len(row["ids"]) for row in rows if row), default=0)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}")
    fill = {"ids": 0, "labels": IGNORE, "places": TEXT, "segments": 0}
    out = {name: np.full((len(rows), length), value, np.int32) for name, value in fill.items()}
    for i, row in enumerate(rows):
        if not row:
            continue
        count = len(row["ids"])
        where = slice(0, count) if side == "right" else slice(length - count, length)
        for name, array in {"segments": 1, **row}.items():
            out[name][i, where] = array
    return out


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that is long enough, or the largest."""
    return next((bucket for bucket in buckets if bucket >= length), buckets[-1])
