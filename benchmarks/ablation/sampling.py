"""Draw with one model by each of the recipes, and look the pictures up."""

import dataclasses
import os

import numpy as np

from benchmarks.ablation.suites import RECIPES

_BATCH = 32


def draw(workdir: str | os.PathLike, inception: str = "") -> dict[str, dict[str, float]]:
    """Return `generation.retrieval`'s figures of each recipe on the held-out emoji.

    The tokenizer's semantic encoder judges, and with its weights Inception, which had no part in
    training.
    """
    from tokenflow_jax.data import pipeline
    from tokenflow_jax.data.captions.batches import Pictures
    from tokenflow_jax.evals.fid_network import Network
    from tokenflow_jax.generation import retrieval
    from tokenflow_jax.generation.api import Generator

    generator = Generator.load(workdir)
    size = generator.tokenizer.config.image_size
    examples = Pictures(
        pipeline.DataConfig("emoji", "", split="heldout", image_size=size, augment="center",
                            flip=False)
    )  # fmt: skip
    judges = {}
    if inception:
        network = Network(inception)

        def features(codes_NL: np.ndarray) -> np.ndarray:
            parts = range(0, len(codes_NL), _BATCH)
            drawn = [generator.decode(codes_NL[i : i + _BATCH]) for i in parts]
            return network.features(np.concatenate(drawn))

        judges["inception"] = features
    found = {}
    for name, changes in RECIPES.items():
        recipe = dataclasses.replace(generator.recipe, **changes)
        found[name] = retrieval.caption_retrieval(
            generator, recipe, examples, count=128, batch_size=_BATCH, judges=judges
        )
    return found
