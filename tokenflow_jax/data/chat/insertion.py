"""Places of image vectors among the tokens, in shapes that do not depend on the content.

A row of ids with image markers becomes a row of positions, each of which says where its input comes
from. With 3 vectors per image, padded to 8 on the right:

    ids of the tokens    5  IMAGE_ID     7   9
    ids                  5   0   0   0   7   9   0   0
    places              -1   0   1   2  -1  -1  -1  -1      vector of the row's images, -1: text
    segments             1   1   1   1   1   1   0   0      conversation of the row, 0: padding

A picture that the model draws stands at DRAWN_ID: the ids of `<img>`, a place for each of its
codes, from -2 downwards, and the ids of `</img>`. Its codes carry loss, but the host does not know
them, so their labels are IGNORE.

A row's images are numbered on: the second one's vectors are 3, 4, 5. A row without a marker still
has an image, which nothing reads. Conversations that share a row (`join_rows`) are its segments:
each has its own image, and the model gives each positions from 0
(`understanding.model.positions_in`) and lets none read another.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenflow_jax.data.chat.templates import DRAWN_ID, IGNORE, IMAGE_ID

TEXT = -1  # the place of a position without an image vector; below: of a code, see `code_places`


class Drawn(NamedTuple):
    """What stands at the marker of a picture that is drawn."""

    codes: int
    open_ids: Sequence[int] = ()  # `<img>`
    close_ids: Sequence[int] = ()  # `</img>`
    trained: int = 0  # the first ones, with which rows end a picture; 0: all, then `</img>`

    @property
    def ids(self) -> list[int]:
        """The ids in place of the marker."""
        codes = [DRAWN_ID] * (self.trained or self.codes)
        return [*self.open_ids, *codes, *([] if self.trained else self.close_ids)]


def code_places(first: int, count: int) -> np.ndarray:
    """Return the places of `count` codes from code `first` of a row's images on."""
    return TEXT - 1 - np.arange(first, first + count)


def merge_row(
    ids_T: np.ndarray,  # without padding, IMAGE_ID at the markers
    labels_T: np.ndarray | None,  # None: IGNORE everywhere
    vectors: int | Sequence[int],  # per image, or one number for each marker
    max_length: int | None = None,  # cuts a longer row, possibly inside an image
    drawn: Drawn | None = None,  # for rows with a DRAWN_ID
) -> dict[str, np.ndarray]:
    """Replace the markers of one row by the places of image vectors: int32 (L,) arrays."""
    ids_T = np.asarray(ids_T, np.int32)
    labels_T = np.full(len(ids_T), IGNORE, np.int32) if labels_T is None else np.asarray(labels_T)
    if drawn:
        ids_T, labels_T = _with_drawn(ids_T, labels_T, drawn)
    markers = np.flatnonzero(ids_T == IMAGE_ID)
    counts = [vectors] * len(markers) if isinstance(vectors, int) else list(vectors)
    if len(counts) != len(markers):
        raise ValueError(f"{len(markers)} image markers, and images for {len(counts)}")
    repeats = np.ones(len(ids_T), int)
    repeats[markers] = counts
    source = np.repeat(np.arange(len(ids_T)), repeats)[:max_length]
    is_image, is_code = ids_T[source] == IMAGE_ID, ids_T[source] == DRAWN_ID
    places = np.where(is_image, np.cumsum(is_image) - 1, TEXT)
    places[is_code] = code_places(0, is_code.sum())
    return {
        "ids": np.where(is_image | is_code, 0, ids_T[source]).astype(np.int32),
        "labels": np.where(is_image | is_code, IGNORE, labels_T[source]).astype(np.int32),
        "places": places.astype(np.int32),
    }


def _with_drawn(
    ids_T: np.ndarray, labels_T: np.ndarray, drawn: Drawn
) -> tuple[np.ndarray, np.ndarray]:
    """Put `<img>`, a DRAWN_ID for each code and `</img>` where one DRAWN_ID stands."""
    for at in np.flatnonzero(ids_T == DRAWN_ID)[::-1]:
        own = drawn.ids
        labels = [IGNORE] * len(own) if labels_T[at] == IGNORE else own
        ids_T = np.concatenate([ids_T[:at], own, ids_T[at + 1 :]])
        labels_T = np.concatenate([labels_T[:at], labels, labels_T[at + 1 :]])
    return ids_T, labels_T


def join_rows(
    rows: Sequence[Mapping[str, np.ndarray]], vectors: int, codes: int = 0
) -> dict[str, np.ndarray]:
    """Join rows of one image each; an empty row is left out but its image still counts."""
    parts = []
    for number, row in enumerate(rows):
        if not row:
            continue
        labels_L = row["labels"].copy()
        labels_L[:1] = IGNORE  # the token before belongs to another conversation
        shifts = np.sign(row["places"] - TEXT) * number  # up for vectors, down for codes
        places_L = row["places"] + shifts * np.where(shifts > 0, vectors, codes)
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
