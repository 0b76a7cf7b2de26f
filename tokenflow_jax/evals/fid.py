"""FID (Heusel et al. 2017, arXiv 1706.08500) with the 2015 Inception weights.

    python -m tokenflow_jax.evals.fid --a=FOLDER --b=FOLDER --inception=default_1.pt

compares two folders of images, or two ArrayRecord data sets of `data.prepare`. Uint8 images are
resized to 299 px (bilinear, half-pixel centres, no antialiasing) and scaled to [-1, 1].
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tokenflow_jax.data import pipeline
from tokenflow_jax.evals import command
from tokenflow_jax.evals.frechet import Statistics, frechet_distance
from tokenflow_jax.evals.image_set import ImageSet, kind_of_data
from tokenflow_jax.log import log
from tokenflow_jax.nets.inception import POOL_FEATURES, Inception
from tokenflow_jax.parallel import hosts
from tokenflow_jax.weights.names.inception import load_inception

Batch = Mapping[str, np.ndarray]

# Of fewer images the covariance is singular, and FID is mostly bias.
ENOUGH_IMAGES = POOL_FEATURES + 1
_CPU_BATCH = 8  # small enough for the caches: twice as fast as 100 on two CPU cores


def file_checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Network:
    """The Inception network with its weights.

    Attributes:
      checksum: SHA-256 of the weights' file.
    """

    def __init__(self, path: str | os.PathLike):
        """Loads the weights.

        Args:
          path: see `weights.names.inception.load_inception`.

        Raises:
          ValueError: no such file, or another network.
        """
        self._params = hosts.to_local_devices(load_inception(path))
        self.checksum = file_checksum(path)
        network = Inception()
        self._features = hosts.over_local_devices(
            lambda params, images_BHWC: network.apply(
                {"params": params}, images_BHWC.astype(jnp.float32) / 127.5 - 1
            )["pool"]
        )

    def features(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Pooled features (B, 2048) float32 of uint8 images of any size."""
        step = _CPU_BATCH if jax.default_backend() == "cpu" else len(images_BHWC)
        parts = []
        for start in range(0, len(images_BHWC), step):
            part = images_BHWC[start : start + step]
            missing = (-len(part)) % step  # one shape, so one compilation
            padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            parts.append(np.asarray(self._features(self._params, padded))[: len(part)])
        return np.concatenate(parts)


class Fingerprint:
    """Names a set of images by their pixels, whatever their order and the process that saw them."""

    def __init__(self):
        self._sum = 0
        self._count = 0

    def update(self, images_BHWC: np.ndarray) -> None:
        """Adds uint8 images."""
        for image in images_BHWC:
            digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8)
            self._sum += int.from_bytes(digest.digest(), "little")
        self._count += len(images_BHWC)

    def over_processes(self) -> str:
        """The fingerprint of what all processes saw; each must call this."""
        mine = np.array([self._sum % 2**64, self._count], np.uint64)
        total, count = hosts.sum_over_processes({"all": mine})["all"]
        return f"{int(count)}-{int(total):016x}"


class Reference:
    """Statistics of the true images, computed once and kept, in memory and in a folder.

    They are kept by the weights' checksum and the images' fingerprint, which is known after an
    evaluation has seen the images. Other images or weights therefore never meet them.

    Attributes:
      network: computes the features.
      change: what is made of the uint8 images before they are compared and fingerprinted.
    """

    def __init__(
        self,
        network: Network,
        batches: Iterable[Batch],
        folder: str | os.PathLike | None = None,
        description: str = "",
        change: Callable[[np.ndarray], np.ndarray] = lambda images_BHWC: images_BHWC,
    ):
        """Nothing is computed before `statistics`.

        Args:
          network: computes the features.
          batches: the images; iterated over once per set of images that is not known yet.
          folder: where statistics are kept, a file of 34 MB for each set; None: in memory alone.
          description: of the images, for people who look into the file.
          change: see the attribute.
        """
        self.network, self.change = network, change
        self._batches = batches
        self._folder = pathlib.Path(folder) if folder else None
        self._description = description
        self._known: dict[str, Statistics] = {}

    def statistics(self, fingerprint: str) -> Statistics:
        """Statistics of the images with a fingerprint; every process must call this.

        Raises:
          ValueError: the file that holds them is damaged.
        """
        if fingerprint not in self._known:
            about = {"fingerprint": fingerprint, "inception_sha256": self.network.checksum}
            path = self._folder and self._folder / f"fid-{_digest(json.dumps(about))[:16]}.npz"
            found = read_statistics(path, about) if path and path.exists() else None
            # Folders may differ between hosts, and the computation is one that all take part in.
            everywhere = hosts.sum_over_processes({"found": np.array(found is not None, int)})
            if found is None or everywhere["found"] < jax.process_count():
                found = self._compute()
                if path:
                    write_statistics(path, found, about | {"images": self._description})
            else:
                log.info("reference statistics read from %s", path)
            self._known[fingerprint] = found
        return self._known[fingerprint]

    def _compute(self) -> Statistics:
        statistics = Statistics.empty(POOL_FEATURES)
        for batch in self._batches:
            features_BD = self.network.features(self.change(batch["image"]))
            statistics.update(features_BD[batch["mask"]])
        return statistics.over_processes()


def _digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
    return whole.hexdigest()


def write_statistics(path: pathlib.Path, statistics: Statistics, about: Mapping[str, Any]) -> None:
    """Writes statistics with a checksum; the file appears when it is complete."""
    text = json.dumps(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{jax.process_index()}-{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            count=statistics.count,
            sum=statistics.sum_D,
            outer=statistics.outer_DD,
            about=text,
            sha256=_checksum(statistics, text),
        )
    os.replace(partial, path)


def read_statistics(path: pathlib.Path, about: Mapping[str, Any]) -> Statistics:
    """Reads what `write_statistics` wrote about the same images and weights.

    Raises:
      ValueError: the file is damaged, or of other images or weights.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            statistics = Statistics(int(file["count"]), file["sum"], file["outer"])
            text = str(file["about"])
            intact = _checksum(statistics, text) == str(file["sha256"])
            intact = intact and about.items() <= json.loads(text).items()
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        intact = False
    if not intact:
        raise ValueError(
            f"the reference statistics {path} are damaged (checksum): delete the file, and they "
            "are computed again"
        )
    return statistics


def _checksum(statistics: Statistics, about: str) -> str:
    sums = statistics.sum_D.tobytes(), statistics.outer_DD.tobytes()
    return _digest(str(statistics.count), about, *sums)


def distance(statistics: Statistics, reference: Statistics) -> float:
    """FID between two sets of images."""
    return frechet_distance(
        statistics.mean, statistics.covariance, reference.mean, reference.covariance
    )


def caution(*counts: int) -> str:
    """What to keep in mind about an FID of so few images; "" when they are enough."""
    if min(counts) >= ENOUGH_IMAGES:
        return ""
    return (
        f"{min(counts):,} images are fewer than {ENOUGH_IMAGES:,}: the covariance is singular and "
        "FID mostly bias; compare it only with figures of as many images"
    )


def main() -> None:
    """Runs the command line."""
    options = flags.FLAGS
    network = Network(options.inception)
    size = options.image_size or _short_side(options.a, options.split)
    sides, known = [_images(path, options, size) for path in (options.a, options.b)], []
    for side in sides:
        fingerprint = Fingerprint()
        for batch in side.doing("reading"):
            fingerprint.update(batch["image"][batch["mask"]])
        reference = Reference(network, side.doing("Inception"), options.cache, side.describe())
        known.append(reference.statistics(fingerprint.over_processes()))
    value = distance(*known)
    if jax.process_index():
        return
    print(f"FID {value:.4f}")
    for name, side, statistics in zip("ab", sides, known, strict=True):
        print(f"  {name}: {statistics.count:,} images, {side.describe()}")
    print(f"  Inception weights SHA-256 {network.checksum}")
    if note := caution(*(statistics.count for statistics in known)):
        print(f"  {note}")
    for note in pipeline.skipped_notes(*(side.config for side in sides)):
        print(f"  {note}")


def _images(path: str, options: flags.FlagValues, size: int) -> ImageSet:
    kind = kind_of_data(path)
    config = pipeline.DataConfig(kind, path, options.split, size, "center", flip=False)
    return ImageSet(config, options.batch_size, options.images)


def _short_side(path: str, split: str) -> int:
    """The short side of a data set's first usable image."""
    config = pipeline.DataConfig(kind_of_data(path), path, split, augment="center")
    decoded = pipeline.opened(config)
    first = next((example for i in range(len(decoded)) if (example := decoded[i])), None)
    if first is None:
        raise ValueError(decoded.nothing_usable())
    return min(first["image"].shape[:2])


def _define_flags() -> None:
    """Only for the command line: other commands have flags of the same names."""
    flags.DEFINE_string("a", None, "Folder of images, or of a data set of data.prepare.")
    flags.DEFINE_string("b", None, "The same; what is compared with a.")
    flags.DEFINE_string("inception", None, command.INCEPTION_HELP)
    flags.DEFINE_string("split", "all", "Which part of both; see data.sources.")
    flags.DEFINE_string("cache", None, "Folder where statistics are kept; none by default.")
    flags.DEFINE_integer("image_size", 0, "Resolution of the crops; 0: a's first short side.")
    flags.DEFINE_integer("images", None, "Use so many of each, evenly spaced; all by default.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time, per process.")
    flags.mark_flags_as_required(["a", "b", "inception"])


if __name__ == "__main__":
    _define_flags()
    command.run("fid", main)
