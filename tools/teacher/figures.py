"""What a small teacher knows: k-NN accuracies beside those of raw pixels and of Inception."""

from typing import Any

import jax
import numpy as np

from tokenflow_jax.data.images import center_crop
from tokenflow_jax.evals.knn import knn_accuracy
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tools.teacher import targets
from tools.teacher.pictures import Pictures

PyTree = Any


def make_encoder(vit: ViTConfig):
    """Returns a function (ViT params, uint8 (N, H, W, 3)) -> mean tokens (N, D), in chunks."""
    model = ViT(vit, unroll=vit.depth)
    encode = jax.jit(
        lambda params, images: model.apply({"params": params}, images / 127.5 - 1.0).mean(1)
    )

    def encoder(params: PyTree, images: np.ndarray, chunk: int = 200) -> np.ndarray:
        parts = [
            np.asarray(encode(params, images[i : i + chunk].astype(np.float32)))
            for i in range(0, len(images), chunk)
        ]
        return np.concatenate(parts)

    return encoder


def knn_figures(
    encoder: Any,
    params: PyTree,
    cifar10: tuple[Pictures, Pictures],
    emoji: tuple[Pictures, Pictures],
) -> dict[str, float]:
    """k-NN accuracies (k = 20, see `evals.knn`) with the training pictures as the labelled bank.

    Args:
      encoder: from `make_encoder`.
      params: of the ViT.
      cifar10, emoji: (train, held-out) pictures.

    Returns:
      For CIFAR-10's classes and the emoji's groups: the student, raw pixels, and for the uneven
      groups the share of the largest one.
    """
    figures = {}
    for name, (bank, queries) in {"cifar10": cifar10, "emoji_groups": emoji}.items():
        # Pixels at 32 px: all that CIFAR-10 has, in a quarter of the memory.
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
    features: Any, bank_NP: np.ndarray, cifar10: tuple[Pictures, Pictures], count: int
) -> float:
    """k-NN accuracy of the targets themselves, on the first `count` test pictures of CIFAR-10."""
    images = cifar10[1].images[:count]
    chunk = targets.BATCH
    queries = [
        np.asarray(features(images[i : i + chunk])["pooled"]) for i in range(0, count, chunk)
    ]
    mean_P, std_P = targets.standardisation(bank_NP)
    bank_NP = ((bank_NP - mean_P) / std_P).astype(np.float32)
    queries_QP = (np.concatenate(queries) - mean_P) / std_P
    return knn_accuracy(bank_NP, cifar10[0].labels, queries_QP, cifar10[1].labels[:count])
