"""The images of an evaluation: where they are, and each process its share of them."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from tokenflow_jax import log as runlog
from tokenflow_jax.data import pipeline, records
from tokenflow_jax.train import metrics

CROP = "short side to the resolution (halved by averaging, then bicubic), centre crop"
_HELDOUT = ("heldout", "validation", "val", "test")
_SECONDS = 5


def kind_of_data(path: str) -> str:
    """What lies at a path: "array_record", "folder", or "emoji" for no path at all."""
    if not path:
        return "emoji"
    folder = pathlib.Path(path)
    is_folder = folder.is_dir() and not (folder / records.MANIFEST).is_file()
    return "folder" if is_folder else "array_record"


def heldout_split(name: str, path: str) -> str:
    """The split of a data set that never trains.

    Args:
      name: kind of data, see `data.pipeline.DataConfig`.
      path: where they are.

    Returns:
      Its name.

    Raises:
      ValueError: an ArrayRecord data set without one.
    """
    if name == "tfds":
        return "validation"
    manifest = pathlib.Path(path) / records.MANIFEST
    if name != "array_record" or not manifest.is_file():
        return "heldout"
    splits = list(json.loads(manifest.read_text(encoding="utf-8"))["splits"])
    for split in _HELDOUT:
        if split in splits:
            return split
    raise ValueError(f"{path} has only the splits {splits}, none held out: choose with --split")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The images of an evaluation, the share of this process.

    Attributes:
      config: where they come from and their resolution.
      batch_size: per process.
      limit: uses only so many, evenly spaced; None all.
      task: what is done to them, for the progress line.
    """

    config: pipeline.DataConfig
    batch_size: int
    limit: int | None = None
    task: str = "held-out images"

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches as `pipeline.eval_batches` yields them; logs images/s and the time left."""
        batches = pipeline.eval_batches(
            self.config,
            batch_size=self.batch_size,
            limit=self.limit,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )
        return _with_progress(batches, self.total, self.task)

    def doing(self, task: str) -> "ImageSet":
        """The same images for another task."""
        return dataclasses.replace(self, task=task)

    @property
    def total(self) -> int:
        """Images of all processes, broken ones included."""
        available = len(pipeline.opened(self.config))
        return min(self.limit or available, available)

    def describe(self) -> str:
        """For example `emoji, split heldout, 64 px, short side to ..., centre crop`."""
        c = self.config
        return f"{c.name} {c.path}".strip() + f", split {c.split}, {c.image_size} px, {CROP}"


def _with_progress(
    batches: Iterable[dict[str, np.ndarray]], total: int, task: str
) -> Iterator[dict[str, np.ndarray]]:
    """Passes batches on; the rate leaves the first batch out, in which everything compiles."""
    done, start, first, last = 0, 0.0, 0, time.monotonic()
    for batch in batches:
        yield batch
        now = time.monotonic()
        done += int(batch["mask"].sum()) * jax.process_count()
        if not first:
            start, first = now, done
        elif now - last >= _SECONDS and done > first:
            rate, last = (done - first) / (now - start), now
            left = metrics.duration(max(0, total - done) / rate)
            runlog.log.info("%s: %d of %d, %.1f images/s, eta %s", task, done, total, rate, left)
