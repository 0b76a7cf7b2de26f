"""Figures of reconstructions: rFID, PSNR, SSIM, LPIPS, and the codes in use."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.evals import fid_network, similarity
from tokenflow_jax.nets.lpips import LPIPS
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.parallel import hosts

Measure = Callable[[np.ndarray, np.ndarray], jax.Array | np.ndarray]

MEASURES: Mapping[str, Measure] = {
    "psnr": similarity.psnr,
    "ssim": similarity.ssim,
    "ssim_reference": lambda images, reconstructions: similarity.ssim(
        images, reconstructions, similarity.REFERENCE_SSIM_RANGE
    ),
}


def lpips_measure(params: Mapping[str, Any]) -> Measure:
    """Return LPIPS between uint8 images, with weights of `weights.names.lpips`."""
    params, network = hosts.to_local_devices(params), LPIPS()
    compiled = hosts.over_local_devices(
        lambda params, *pair: network.apply({"params": params}, *map(to_float, pair))
    )
    return lambda images, reconstructions: compiled(params, images, reconstructions)


def evaluate(
    reconstruct: Callable[[np.ndarray], tuple[jax.Array, jax.Array]],
    batches: Iterable[Mapping[str, np.ndarray]],
    codebook_size: int | Mapping[str, int],
    scales: Any,
    *,
    indices: Callable[[np.ndarray], Any] = lambda codes: codes,
    measures: Mapping[str, Measure] = MEASURES,
    reference: fid_network.Reference | None = None,
) -> dict[str, float]:
    """Measure the reconstructions of a data set, each process its share of it.

    Args:
      reconstruct: uint8 images (B, H, W, 3) to (codes (B, L), uint8 reconstructions).
      batches: this process's {"image": uint8, "mask": bool, True for real images}.
      codebook_size: the number of codes, or of each of the `indices` that a code holds, by name.
      scales: the `tokenizer.pyramid.Scales` that the codes fill.
      measures: name -> one number per image of (images, reconstructions).
      reference: of the originals; adds "rfid".

    Returns:
      The measures' means over images, "psnr_reference" (see `similarity`: the same as "psnr"),
      "images", and over all scales and for each: "codes_used" (fraction of the codebook),
      "perplexity" (exp of the entropy of the codes), "codes_used/scale_<side>", ...; of several
      indices "codes_used/<name>", "codes_used/<name>/scale_<side>", ...

    Raises:
      ValueError: there are no images.
    """
    totals = {name: np.zeros(()) for name in measures} | {"images": np.zeros(())}
    sizes = codebook_size if isinstance(codebook_size, Mapping) else {"": codebook_size}
    counts = {name: np.zeros((len(scales), size), np.int64) for name, size in sizes.items()}
    rfid = fid_network.Distance(reference) if reference else None
    for batch in batches:
        images, mask = batch["image"], batch["mask"]
        codes_BL, reconstructions = jax.device_get(reconstruct(images))
        for name, measure in measures.items():
            totals[name] += np.asarray(measure(images, reconstructions), np.float64)[mask].sum()
        totals["images"] += mask.sum()
        found = indices(codes_BL[mask])
        for name, codes_BL in found.items() if isinstance(found, Mapping) else [("", found)]:
            for s, part in enumerate(scales.slices()):
                counted_K = np.bincount(codes_BL[:, part].ravel(), minlength=sizes[name])
                counts[name][s] += counted_K
        if rfid:
            rfid.update(images, reconstructions, mask)
    totals, counts = hosts.sum_over_processes(totals), hosts.sum_over_processes(counts)
    images = float(totals.pop("images"))
    if not images:
        raise ValueError("no images to evaluate: the held-out split is empty")
    figures = {name: float(total) / images for name, total in totals.items()}
    if "psnr" in figures:
        figures["psnr_reference"] = figures["psnr"]
    if rfid:
        figures["rfid"] = rfid.finish()
    for name, counts_SK in counts.items():
        figures |= _usage(counts_SK, scales, name and f"/{name}")
    return figures | {"images": images}


def _usage(counts_SK: np.ndarray, scales: Any, of: str) -> dict[str, float]:
    figures = {}
    rows = {"": counts_SK.sum(axis=0)}
    rows |= {f"/scale_{side}": row for side, row in zip(scales.sides, counts_SK, strict=True)}
    for name, counts_K in rows.items():
        share = counts_K[counts_K > 0] / counts_K.sum()
        figures[f"codes_used{of}{name}"] = float(np.mean(counts_K > 0))
        figures[f"perplexity{of}{name}"] = float(np.exp(-np.sum(share * np.log(share))))
    return figures
