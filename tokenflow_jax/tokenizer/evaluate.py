"""Held-out figures and grids of a tokenizer during training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.data import pipeline
from tokenflow_jax.evals import fid_network, knn, measures
from tokenflow_jax.evals.image_set import ImageSet
from tokenflow_jax.evals.pictures import labelled_grid
from tokenflow_jax.nets.pixels import to_float, to_uint8
from tokenflow_jax.parallel import hosts
from tokenflow_jax.tokenizer.model import TokenFlow

PyTree = Any


def reconstructor(model: TokenFlow) -> Callable:
    """Compile (params, uint8 images) -> (codes (B, L), uint8 reconstructions, quantized map)."""

    def reconstruct(params, images_BHWC):
        pyramid, decoded = model.apply({"params": params}, to_float(images_BHWC))
        return pyramid.codes_BL, to_uint8(decoded.images_BHWC), pyramid.quantized_BHWC

    return hosts.over_local_devices(reconstruct)


class Evaluation:
    """Figures and grids of parameters that are whole on this process's devices."""

    def __init__(
        self,
        model: TokenFlow,
        options: Any,  # `config.eval`
        train_set: pipeline.DataConfig,  # the bank of the k-NN figures
        eval_set: pipeline.DataConfig,  # the held-out pictures
        lpips: PyTree | None,  # LPIPS weights; None leaves that figure out
        between_batches: Callable[[], None],  # see `train.stage.Stage`
    ):
        self._config, self._options = model.config, options
        self._between_batches = between_batches
        self._reconstruct = reconstructor(model)
        # Apart, so that the decoder is compiled once for all numbers of scales.
        apply = model.apply
        self._features = jax.jit(lambda p, codes: apply({"params": p}, codes, method="features"))
        pixels = functools.partial(apply, method="decode_pixels")
        self._decode = jax.jit(lambda p, maps: to_uint8(pixels({"params": p}, maps)[0]))
        self._bank = dataclasses.replace(train_set, augment="center", flip=False)
        self._eval_set = eval_set
        self._held_out = ImageSet(
            eval_set, options.batch_size, options.examples or None, between_batches=between_batches
        )
        self._reference = None
        if options.fid_weights:
            network = fid_network.Network(options.fid_weights)
            self._reference = fid_network.Reference(network, self._held_out)
        self._measures = {name: measures.MEASURES[name] for name in ("psnr", "ssim")}
        if lpips is not None:
            self._measures["lpips"] = measures.lpips_measure(lpips)

    @property
    def has_label(self) -> bool:
        """The held-out pictures have the label of the k-NN figures."""
        return self._options.knn_label in pipeline.opened(self._eval_set).source.numbers

    def figures(self, params: PyTree) -> dict[str, float]:
        """Return PSNR, SSIM, LPIPS and rFID where there are weights, and the codes in use."""
        found = measures.evaluate(
            lambda images: self._reconstruct(params, images)[:2],
            self._held_out,
            self._config.index_sizes,
            self._config.pyramid,
            indices=self._config.indices,
            measures=self._measures,
            reference=self._reference,
        )
        sizes = self._config.index_sizes
        several = sizes if isinstance(sizes, Mapping) else ()
        used = ("codes_used", *(f"codes_used/{name}" for name in several))
        shown = (*self._measures, "rfid", *used, "images")
        return {name: found[name] for name in shown if name in found}

    def knn_figures(self, params: PyTree) -> dict[str, float]:
        """Return k-NN accuracies of held-out labels from each half's mean quantized features.

        Pictures without a label are left out; without any label there is no figure.
        """
        bank, queries = (self._mean_features(params, d) for d in (self._bank, self._eval_set))
        if not len(bank["label"]) or not len(queries["label"]):
            return {}
        k = min(self._options.knn_k, len(bank["label"]))
        figures = {
            f"knn_{half}": knn.knn_accuracy(
                bank[half], bank["label"], queries[half], queries["label"], k=k
            )
            for half in ("semantic", "pixel")
        }
        largest = np.bincount(bank["label"]).argmax()
        return figures | {"knn_largest_class": float(np.mean(queries["label"] == largest))}

    def _mean_features(self, params: PyTree, data: pipeline.DataConfig) -> Mapping[str, np.ndarray]:
        rows = {"semantic": [], "pixel": [], "label": []}
        for batch in pipeline.eval_batches(data, batch_size=self._options.batch_size):
            known_B = batch["mask"] & (batch[self._options.knn_label] >= 0)
            maps_BHWC = np.asarray(self._reconstruct(params, batch["image"])[2])[known_B]
            means_BC, half = maps_BHWC.mean(axis=(1, 2)), self._config.semantic_channels
            rows["semantic"].append(means_BC[:, :half])
            rows["pixel"].append(means_BC[:, half:])
            rows["label"].append(batch[self._options.knn_label][known_B])
            self._between_batches()
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    @functools.cached_property
    def _shown(self) -> Mapping[str, np.ndarray]:
        """The held-out pictures of the grids, always the same; a whole batch, mostly padding."""
        size, limit = self._options.batch_size, self._options.grid_images
        return next(iter(pipeline.eval_batches(self._eval_set, batch_size=size, limit=limit)))

    def grids(self, params: PyTree) -> dict[str, np.ndarray]:
        """Return originals above reconstructions, and pictures growing scale by scale."""
        real, scales = self._shown["mask"], self._config.pyramid
        codes, pixels, _ = jax.device_get(self._reconstruct(params, self._shown["image"]))
        images = self._shown["image"][real]
        sheet = labelled_grid([images, pixels[real]], ["original", "reconstruction"])
        grids = {"reconstruction": sheet}
        if len(scales) > 1:
            ends = [where.stop * self._config.quantizer.heads for where in scales.slices()]
            maps = [self._features(params, codes[:, :end]) for end in ends]
            growing = [np.asarray(self._decode(params, m))[real] for m in maps]
            labels = [*scales.labels, "original"]
            grids["scales"] = labelled_grid([*growing, images], labels)
        return grids
