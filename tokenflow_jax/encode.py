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

from tokenflow_jax import api, encoding, runlog
from tokenflow_jax.data import captions, codes, pipeline
from tokenflow_jax.evals import command, image_set

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The tokenizer: a workdir, one of its checkpoints, or a PyTorch file."
)
_VARIANT = flags.DEFINE_string("variant", None, "Which model a PyTorch file holds.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a workdir; the newest by default.")
_DATA = flags.DEFINE_enum(
    "data", "", ["", "emoji", "folder", "jsonl", "array_record", "tfds"],
    "Kind of data set; by default what lies at --path, or the emoji.",
)  # fmt: skip
_PATH = flags.DEFINE_string("path", "", "Where the pictures are.")
_IMAGE_FOLDER = flags.DEFINE_string("image_folder", "", "jsonl: where paths of images begin.")
_SPLITS = flags.DEFINE_list("splits", ["train", "heldout"], "Which parts of the data set.")
_OUT = flags.DEFINE_string("out", None, "Folder of the new data set.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Pictures at a time, per process.", lower_bound=1)
_PER_FILE = flags.DEFINE_integer(
    "records_per_file", 10_000, "Pictures per part: what a killed command has to do again at most."
)
_INDEX = flags.DEFINE_integer("shard_index", None, "This host, from 0.")
_COUNT = flags.DEFINE_integer("shard_count", None, "How many hosts there are.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Encoders compute in.")


def main() -> None:
    """Encodes what the flags ask for.

    Raises:
      ValueError: wrong flags, data or tokenizer.
      OSError: the output cannot be written.
    """
    missing = [name for name in ("checkpoint", "out") if not flags.FLAGS[name].value]
    if missing:
        raise ValueError(f"say {' and '.join('--' + name for name in missing)}")
    if (_INDEX.value is None) != (_COUNT.value is None):
        raise ValueError("--shard_index and --shard_count go together")
    tokenizer = api.Tokenizer.load(
        _CHECKPOINT.value, _VARIANT.value, step=_STEP.value, dtype=_DTYPE.value
    )
    kind = _DATA.value or image_set.kind_of_data(_PATH.value)
    data_sets = {
        split: captions.Pictures(
            pipeline.DataConfig(
                name=kind,
                path=_PATH.value,
                split=split,
                image_size=tokenizer.config.image_size,
                augment="center",
                flip=False,
                cache_megabytes=0,  # every picture is seen once
                image_folder=_IMAGE_FOLDER.value,
            )
        )
        for split in _SPLITS.value
    }
    written = encode(
        tokenizer,
        data_sets,
        _OUT.value,
        source=f"{kind} {_PATH.value}".strip(),
        batch_size=_BATCH.value,
        records_per_file=_PER_FILE.value,
        shard_index=jax.process_index() if _INDEX.value is None else _INDEX.value,
        shard_count=jax.process_count() if _COUNT.value is None else _COUNT.value,
    )
    for note in captions.skipped_notes(*data_sets.values()):
        runlog.log.info("%s", note)
    done = "complete" if written else "this host's parts are; others are still missing"
    runlog.log.info("codes of tokenizer %s in %s: %s", tokenizer.fingerprint, _OUT.value, done)


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
        rows = encoding.with_progress(rows, len(places), file.name)
        count = writer.write(file, (row for row in rows if row is not None))
        runlog.log.info("%s: %d of %d pictures", file.name, count, len(places))
    return writer.finish()


def run() -> None:
    """Entry point of `python -m tokenflow_jax.encode`."""
    command.run("encode", main)


if __name__ == "__main__":
    run()
