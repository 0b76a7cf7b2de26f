r"""Write a data set of codes, so that training a generator need not encode pictures again.

    python -m tokenflow_jax.encode --checkpoint=runs/quickstart --out=DIR              the emoji
    python -m tokenflow_jax.encode --checkpoint=tokenflow_b.pt --variant=b_256 \
        --data=jsonl --path=captions.jsonl --out=DIR

The same command continues a killed one, part by part. Several hosts with one --out share the parts:
start them with --shard_index and --shard_count, or with --distributed on a pod; the last one to
finish writes dataset.json. Then train with --config.data.name=codes --config.data.path=DIR.
"""

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import flags

from tokenflow_jax import cli, files
from tokenflow_jax.log import Progress, compiling, log

if TYPE_CHECKING:  # loaded in main, so that --help is quick
    from tokenflow_jax.data.captions.batches import Pictures
    from tokenflow_jax.tokenizer.api import Tokenizer


def main(options: flags.FlagValues) -> None:
    cli.require(options, "checkpoint", "out")
    if (options.shard_index is None) != (options.shard_count is None):
        raise ValueError("--shard_index and --shard_count go together")
    files.writable_folder(options.out)
    log.info("%s", compiling(f"loading {options.checkpoint} and compiling", 15))
    import jax

    from tokenflow_jax.data import pipeline
    from tokenflow_jax.data.captions import batches as captions
    from tokenflow_jax.evals import image_set
    from tokenflow_jax.tokenizer import api

    tokenizer = api.Tokenizer.load(
        options.checkpoint, options.variant, step=options.step, dtype=options.dtype
    )
    kind = options.data or image_set.kind_of_data(options.path)
    data_sets = {
        split: captions.Pictures(
            pipeline.DataConfig(
                name=kind,
                path=options.path,
                split=split,
                image_size=tokenizer.config.image_size,
                augment="center",
                flip=False,
                cache_megabytes=0,  # every picture is seen once
                image_folder=options.image_folder,
                allow_outside=options.allow_outside,
                image_column=options.image_column,
            )
        )
        for split in options.splits
    }
    written = encode(
        tokenizer,
        data_sets,
        options.out,
        source=f"{kind} {options.path}".strip(),
        batch_size=options.batch_size,
        records_per_file=options.records_per_file,
        shard_index=jax.process_index() if options.shard_index is None else options.shard_index,
        shard_count=jax.process_count() if options.shard_count is None else options.shard_count,
    )
    for note in captions.skipped_notes(*data_sets.values()):
        log.info("%s", note)
    done = "complete" if written else "this host's parts are done, others are still missing"
    log.info("codes of tokenizer %s in %s: %s", tokenizer.fingerprint, options.out, done)


def encode(
    tokenizer: "Tokenizer",
    data_sets: Mapping[str, "Pictures"],
    out: str,
    *,
    source: str,
    batch_size: int = 64,
    records_per_file: int = 10_000,
    shard_index: int = 0,
    shard_count: int = 1,
) -> bool:
    """Write this host's missing parts; return True if the parts of all hosts are complete.

    Args:
      source: names the pictures; continuing with others is refused.
      records_per_file: pictures per part.

    Raises:
      CodesError: `out` holds codes of another tokenizer or of other pictures.
    """
    from tokenflow_jax.data.captions import codes
    from tokenflow_jax.tokenizer import encoding

    writer = codes.PartWriter(
        out,
        {"tokenizer": tokenizer.identity, "source": source, "dtype": tokenizer.dtype},
        {split: len(pictures) for split, pictures in data_sets.items()},
        records_per_file=records_per_file,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    encoder = encoding.image_encoder(tokenizer)
    parts = writer.mine()
    line = Progress("encode", sum(len(places) for _, places, _ in parts))
    for split, places, file in parts:
        rows = encoding.encode_pictures(encoder, data_sets[split], places, batch_size)
        rows = line.over(rows, batch_size)
        count = writer.write(file, (row for row in rows if row is not None))
        log.info("%s: %d of %d pictures", file.name, count, len(places))
    return writer.finish()


def define_flags(define: cli.Define) -> None:
    kinds = ["emoji", "folder", "jsonl", "array_record", "tfds", "webdataset", "parquet", "arrow"]
    define.string("checkpoint", None, "A workdir, one of its checkpoints, or a PyTorch file.")
    define.string("variant", None, "Which model a PyTorch file holds.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.enum("data", "", ["", *kinds], "Kind of data set; detected from --path by default.")
    define.string("path", "", "Where the pictures are; the emoji by default.")
    define.string("image_folder", "", "jsonl: where paths of images begin.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    define.string("image_column", "", "parquet, arrow: column of the pictures; found by default.")
    define.list("splits", ["train", "heldout"], "Which parts of the data set.")
    define.string("out", None, "Folder of the new data set.")
    define.integer("batch_size", 64, "Pictures at a time, per process.", 1)
    define.integer("records_per_file", 10_000, "Pictures per part, the unit of continuing.")
    define.integer("shard_index", None, "This host, from 0.")
    define.integer("shard_count", None, "How many hosts there are.")
    define.enum("dtype", "float32", ["float32", "bfloat16"], "Compute in.")


run = functools.partial(cli.run, "encode", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
