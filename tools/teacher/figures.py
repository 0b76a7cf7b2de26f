"""k-NN accuracy of the small teacher, compared with raw pixels and with Inception."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokenflow_jax.data.images import center_crop
from tokenflow_jax.evals.knn import knn_accuracy
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tools.teacher import targets
from tools.teacher.pictures import Pictures

PyTree = Any
Encoder = Callable[[PyTree, np.ndarray], np.ndarray]
_CHUNK = 200


def make_encoder(vit: ViTConfig) -> Encoder:
    """Return a function (ViT params, uint8 (N, H, W, 3)) -> mean tokens (N, D)."""
    model = ViT(vit, unroll=vit.depth)
    encode = jax.jit(lambda params, images: model.apply({"params": params}, images).mean(1))

    def encoder(params: PyTree, images: np.ndarray) -> np.ndarray:
        chunks = (images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK))
        return np.concatenate([np.asarray(encode(params, to_float(chunk))) for chunk in chunks])

    return encoder


def knn_figures(
    encoder: Encoder,
    params: PyTree,
    cifar10: tuple[Pictures, Pictures],
    emoji: tuple[Pictures, Pictures],
) -> dict[str, float]:
    """Measure k-NN accuracy (k = 20) with the training images as the labeled bank.

    Args:
      cifar10, emoji: (train, held-out) images.

    Returns:
      For CIFAR-10's classes and the emoji's groups: the student, raw pixels, and the share of the
      largest class.
    """
    figures = {}
    for name, (bank, queries) in {"cifar10": cifar10, "emoji_groups": emoji}.items():
        # Pixels at 32 px: everything CIFAR-10 has, in a quarter of the memory.
        pixels = [
            np.stack([center_crop(image, 32).ravel() for image in one.images])
            for one in (bank, queries)
        ]
        features = [encoder(params, one.images) for one in (bank, queries)]
        labels = (bank.labels, queries.labels)
        figures[name] = knn_accuracy(features[0], labels[0], features[1], labels[1])
        figures[f"{name}_raw_pixels"] = knn_accuracy(pixels[0], labels[0], pixels[1], labels[1])
        figures[f"{name}_largest_class"] = float(np.bincount(queries.labels).max() / len(queries))
    return figures


def inception_figure(
    features: targets.FeatureFn,
    bank_NP: np.ndarray,
    cifar10: tuple[Pictures, Pictures],
    count: int,
) -> float:
    """Measure k-NN accuracy of the targets on the first `count` test images of CIFAR-10."""
    images = cifar10[1].images[:count]
    chunk = targets.BATCH
    queries = [
        np.asarray(features(images[i : i + chunk])["pooled"]) for i in range(0, count, chunk)
    ]
    mean_P, std_P = targets.standardization(bank_NP)
    bank_NP = ((bank_NP - mean_P) / std_P).astype(np.float32)
    queries_QP = (np.concatenate(queries) - mean_P) / std_P
    return knn_accuracy(bank_NP, cifar10[0].labels, queries_QP, cifar10[1].labels[:count])
