"""The images of an evaluation: where they are, and each process's share of them."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data import arrow, pipeline, records
from tokenflow_jax.log import Progress
from tokenflow_jax.messages import shown

CROP = "short side to the resolution (halved by averaging, then bicubic), center crop"


def kind_of_data(path: str) -> str:
    """Return the kind of data at a path: "array_record", "folder", ...; "emoji" for no path."""
    if not path:
        return "emoji"
    if path.endswith(".tar"):
        return "webdataset"
    if path.endswith(".parquet"):
        return "parquet"
    if arrow.is_saved(path):
        return "arrow"
    is_set = bool(remote.kind_of(remote.join(path, records.MANIFEST)))
    is_folder = remote.kind_of(path) == "folder" and not is_set
    return "folder" if is_folder else "array_record"


def heldout_split(name: str, path: str) -> str:
    """Return the split that never trains, of a kind of data (`pipeline.DataConfig`) at a path."""
    if name == "tfds":
        return "validation"
    manifest = records.read_manifest(path) if name == "array_record" else None
    if manifest is None:
        return "heldout"
    splits = list(manifest["splits"])
    for split in ("heldout", "validation", "val", "test"):
        if split in splits:
            return split
    raise ValueError(
        f"{path} has only the splits {shown(splits)}, none held out: choose with --split"
    )


def short_side(path: str, split: str, allow_outside: bool = False) -> int:
    """Return the short side, in pixels, of a data set's first usable image."""
    config = pipeline.DataConfig(
        kind_of_data(path), path, split, augment="center", allow_outside=allow_outside
    )
    decoded = pipeline.opened(config)
    first = next((example for i in range(len(decoded)) if (example := decoded[i])), None)
    if first is None:
        raise ValueError(decoded.skipped.nothing_usable("picture"))
    return min(first["image"].shape[:2])


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """This process's share of the images of an evaluation."""

    config: pipeline.DataConfig
    batch_size: int  # per process
    limit: int | None = None  # number of evenly spaced images to use; None: all
    task: str = "held-out images"  # for the progress line
    between_batches: Callable[[], None] = lambda: None  # see `train.stage.Stage`

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches of `pipeline.eval_batches` and log the progress over all processes."""
        batches = pipeline.eval_batches(
            self.config,
            batch_size=self.batch_size,
            limit=self.limit,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )
        line, done = Progress(self.task, self.total), 0
        for batch in batches:
            yield batch
            report = line.update if done else line.restart  # everything compiles in the first one
            done += int(batch["mask"].sum()) * jax.process_count()
            report(done)
            self.between_batches()

    def doing(self, task: str) -> "ImageSet":
        """Return the same images for another task."""
        return dataclasses.replace(self, task=task)

    @property
    def total(self) -> int:
        """Images of all processes, broken ones included."""
        available = len(pipeline.opened(self.config))
        return min(self.limit or available, available)

    def describe(self) -> str:
        """Describe the set: `emoji, split heldout, 64 px, short side to ..., center crop`."""
        c = self.config
        return f"{c.name} {c.path}".strip() + f", split {c.split}, {c.image_size} px, {CROP}"
