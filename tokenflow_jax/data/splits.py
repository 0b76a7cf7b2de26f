"""Which examples of a data set never train."""

import zlib

SPLITS = ("train", "heldout", "all")
# Names under which people ask for the part that never trains.
HELDOUT_NAMES = ("heldout", "validation", "val", "test")
# A tenth of fewer pictures than this is too few to measure anything.
MIN_TO_SPLIT = 100


def is_heldout(name: str) -> bool:
    """Whether a picture is in the fixed tenth that never trains; depends on its name alone."""
    return zlib.crc32(name.encode()) % 10 == 0
