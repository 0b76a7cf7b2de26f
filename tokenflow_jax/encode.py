"""Writes a data set of codes, so that training a generator need not encode pictures again.

    python -m tokenflow_jax.encode --checkpoint=runs/quickstart --out=DIR              the emoji
    python -m tokenflow_jax.encode --checkpoint=tokenflow_b.pt --variant=b_256 \
        --data=jsonl --path=captions.jsonl --out=DIR

The same command goes on where it was killed, part by part. Several hosts with one --out share the
parts: start them with --shard_index and --shard_count, or with --distributed on a pod; the last
one to finish writes dataset.json. Then train with

    --config.data.name=codes --config.data.path=DIR
"""

import jax
from absl import flags

from tokenflow_jax.data import pipeline
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.captions import codes
from tokenflow_jax.evals import command, image_set
from tokenflow_jax.log import log, progress
from tokenflow_jax.tokenizer import api, encoding


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    """Encodes what the flags ask for.

    Raises:
      ValueError: wrong flags, data or tokenizer.
      OSError: the output cannot be written.
    """
    missing = [name for name in ("checkpoint", "out") if not options[name].value]
    if missing:
        raise ValueError(f"say {' and '.join('--' + name for name in missing)}")
    if (options.shard_index is None) != (options.shard_count is None):
        raise ValueError("--shard_index and --shard_count go together")
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
    done = "complete" if written else "this host's parts are; others are still missing"
    log.info("codes of tokenizer %s in %s: %s", tokenizer.fingerprint, options.out, done)


def encode(
    tokenizer: api.Tokenizer,
    data_sets: dict[str, captions.Pictures],
    out: str,
    *,
    source: str,
    batch_size: int = 64,
    records_per_file: int = 10_000,
    shard_index: int = 0,
    shard_count: int = 1,
) -> bool:
    """Writes this host's missing parts of a data set of codes.

    Args:
      tokenizer: makes the codes.
      data_sets: split -> pictures.
      out: folder of the data set.
      source: what the pictures are; continuing with others is refused.
      batch_size: pictures at a time.
      records_per_file: pictures per part.
      shard_index, shard_count: this host, and how many there are.

    Returns:
      Whether the data set is complete, with the parts of all hosts.

    Raises:
      CodesError: `out` was begun with another tokenizer or other pictures.
      OSError: it cannot be written.
    """
    writer = codes.PartWriter(
        out,
        {"tokenizer": tokenizer.identity, "source": source, "dtype": tokenizer.dtype},
        {split: len(pictures) for split, pictures in data_sets.items()},
        records_per_file=records_per_file,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    encoder = encoding.image_encoder(tokenizer)
    for split, places, file in writer.mine():
        rows = encoding.encode_pictures(encoder, data_sets[split], places, batch_size)
        rows = progress(rows, len(places), file.name)
        count = writer.write(file, (row for row in rows if row is not None))
        log.info("%s: %d of %d pictures", file.name, count, len(places))
    return writer.finish()


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Not at import: other commands have flags of the same names."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "The tokenizer: a workdir, one of its checkpoints, or a PyTorch file.",
        flag_values=values,
    )
    flags.DEFINE_string("variant", None, "Which model a PyTorch file holds.", flag_values=values)
    flags.DEFINE_integer(
        "step", None, "Which checkpoint of a workdir; the newest by default.", flag_values=values
    )
    flags.DEFINE_enum(
        "data",
        "",
        ["", "emoji", "folder", "jsonl", "array_record", "tfds"],
        "Kind of data set; by default what lies at --path, or the emoji.",
        flag_values=values,
    )
    flags.DEFINE_string("path", "", "Where the pictures are.", flag_values=values)
    flags.DEFINE_string(
        "image_folder", "", "jsonl: where paths of images begin.", flag_values=values
    )
    flags.DEFINE_list(
        "splits", ["train", "heldout"], "Which parts of the data set.", flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the new data set.", flag_values=values)
    flags.DEFINE_integer(
        "batch_size", 64, "Pictures at a time, per process.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "records_per_file",
        10_000,
        "Pictures per part: what a killed command has to do again at most.",
        flag_values=values,
    )
    flags.DEFINE_integer("shard_index", None, "This host, from 0.", flag_values=values)
    flags.DEFINE_integer("shard_count", None, "How many hosts there are.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Encoders compute in.", flag_values=values
    )


def run() -> None:
    """Entry point of `python -m tokenflow_jax.encode`."""
    define_flags()
    command.run("encode", main)


if __name__ == "__main__":
    run()
