"""FID (Heusel et al. 2017, arXiv 1706.08500): Inception's features and statistics of image sets.

Uint8 images are resized to 299 px (bilinear, half-pixel centers, no antialiasing) and scaled to
[-1, 1], with the 2015 Inception weights.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from tokenflow_jax import files, remote
from tokenflow_jax.evals.frechet import Statistics
from tokenflow_jax.log import log
from tokenflow_jax.nets.inception import POOL_FEATURES, Inception
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.parallel import hosts
from tokenflow_jax.weights.names.inception import load_inception

# With fewer images the covariance is singular, and FID is mostly bias.
ENOUGH_IMAGES = POOL_FEATURES + 1
_ARRAYS = ("count", "sum", "outer", "about", "sha256")
_MOST_BYTES = 2**28  # of a file of statistics, eight times what they take
_CPU_BATCH = 8  # small enough for the caches: twice as fast as 100 on two CPU cores


def file_checksum(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(remote.local_copy(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Network:
    """The Inception network with its weights; `checksum` is the SHA-256 of their file."""

    def __init__(self, path: str | os.PathLike):
        self._params = hosts.to_local_devices(load_inception(path))
        self.checksum = file_checksum(path)
        network = Inception()
        self._features = hosts.over_local_devices(
            lambda params, images: network.apply({"params": params}, to_float(images))["pool"]
        )

    def features(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Return pooled features (B, 2048) float32 of uint8 images of any size."""
        step = _CPU_BATCH if jax.default_backend() == "cpu" else len(images_BHWC)
        parts = []
        for start in range(0, len(images_BHWC), step):
            part = images_BHWC[start : start + step]
            missing = (-len(part)) % step  # one shape, so one compilation
            padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            parts.append(np.asarray(self._features(self._params, padded))[: len(part)])
        return np.concatenate(parts)


class Fingerprint:
    """A name for a set of images by their pixels, in any order and over any processes."""

    def __init__(self):
        self._sum = 0
        self._count = 0

    def update(self, images_BHWC: np.ndarray) -> None:
        for image in images_BHWC:
            digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8)
            self._sum += int.from_bytes(digest.digest(), "little")
        self._count += len(images_BHWC)

    def over_processes(self) -> str:
        """Return the fingerprint over all processes; each must call this."""
        mine = np.array([self._sum % 2**64, self._count], np.uint64)
        total, count = hosts.sum_over_processes({"all": mine})["all"]
        return f"{int(count)}-{int(total):016x}"


class Reference:
    """Statistics of the original images, computed once and kept, in memory and in a folder.

    Args:
      batches: the images; iterated over once per set of images that is not known yet.
      folder: keeps the statistics, a file of 34 MB for each set; None: in memory alone.
      description: of the images, for people who look into the file.
      change: applied to the uint8 images before they are compared and fingerprinted.
    """

    # Statistics are kept by the weights' checksum and the images' fingerprint, which is known after
    # an evaluation has seen the images: other images or weights never meet them.

    def __init__(
        self,
        network: Network,
        batches: Iterable[Mapping[str, np.ndarray]],
        folder: str | os.PathLike | None = None,
        description: str = "",
        change: Callable[[np.ndarray], np.ndarray] = lambda images_BHWC: images_BHWC,
    ):
        self.network, self.change = network, change
        self._batches = batches
        self._folder = files.as_path(folder) if folder else None
        self._description = description
        self._known: dict[str, Statistics] = {}

    def statistics(self, fingerprint: str) -> Statistics:
        """Return the statistics of the images with a fingerprint; every process must call this."""
        if fingerprint not in self._known:
            about = {"fingerprint": fingerprint, "inception_sha256": self.network.checksum}
            name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
            path = self._folder and self._folder / f"fid-{name}.npz"
            found = read_statistics(path, about) if path and path.exists() else None
            # Folders may differ between hosts, and all hosts take part in the computation.
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


class Distance:
    """FID to a reference, collected while images pass by."""

    def __init__(self, reference: Reference):
        self._reference = reference
        self._statistics = Statistics.empty(POOL_FEATURES)
        self._fingerprint = Fingerprint()

    def update(self, images_BHWC: np.ndarray, reconstructions_BHWC: np.ndarray, mask_B) -> None:
        """Add the images of a batch where the mask is True."""
        features_BD = self._reference.network.features(reconstructions_BHWC)
        self._statistics.update(features_BD[mask_B])
        self._fingerprint.update(self._reference.change(images_BHWC[mask_B]))

    def finish(self) -> float:
        """Return the distance over all processes; each must call this."""
        originals = self._reference.statistics(self._fingerprint.over_processes())
        return self._statistics.over_processes().distance(originals)


def write_statistics(path: epath.Path, statistics: Statistics, about: Mapping[str, Any]) -> None:
    """Write statistics with a checksum; the file appears when it is complete."""
    text = json.dumps(about)
    arrays = {"count": statistics.count, "sum": statistics.sum_D, "outer": statistics.outer_DD}
    np.savez(file := io.BytesIO(), **arrays, about=text, sha256=_checksum(statistics, text))
    if remote.is_remote(path):
        remote.write(os.fspath(path), file.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one host may write the same file at once, so each has its partial one.
    partial = path.with_name(f"{path.name}.{jax.process_index()}-{os.getpid()}.partial")
    partial.write_bytes(file.getvalue())
    partial.replace(path)


def read_statistics(path: epath.Path, about: Mapping[str, Any]) -> Statistics:
    """Read what `write_statistics` wrote; ValueError if damaged or about other images."""
    try:
        with zipfile.ZipFile(io.BytesIO(files.read_bytes(path, _MOST_BYTES))) as file:
            count, total, outer, text, checksum = (_array(file, name) for name in _ARRAYS)
        statistics, text = Statistics(int(count), total, outer), str(text)
        intact = _checksum(statistics, text) == str(checksum)
        intact = intact and outer.shape == 2 * total.shape
        intact = intact and about.items() <= files.parse_json(text.encode(), str(path)).items()
    except Exception:  # a damaged header makes NumPy and zipfile raise almost anything
        intact = False
    if not intact:
        raise ValueError(
            f"the reference statistics {path} are damaged (checksum): delete the file, and they "
            "are computed again"
        )
    return statistics


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array that is stored as it is; np.load takes the memory that a header declares."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(info) as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def _checksum(statistics: Statistics, about: str) -> str:
    parts = (str(statistics.count).encode(), about.encode(), statistics.sum_D.tobytes())
    return hashlib.sha256(b"".join((*parts, statistics.outer_DD.tobytes()))).hexdigest()


def caution(*counts: int) -> str:
    """Return a warning about an FID of few images; "" when there are enough."""
    if min(counts) >= ENOUGH_IMAGES:
        return ""
    return (
        f"{min(counts):,} images are fewer than {ENOUGH_IMAGES:,}: the covariance is singular and "
        "FID mostly bias; compare it only with figures of as many images"
    )
