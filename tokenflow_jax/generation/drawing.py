"""What stages of models that draw share: a generator of their weights, its grids and figures."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenflow_jax.data.captions.batches import Examples
from tokenflow_jax.evals import pictures
from tokenflow_jax.generation import retrieval
from tokenflow_jax.generation.api import Generator

PyTree = Any


class Draws:
    """A part of a stage with `prompts` and, once it is open, the recipe `_recipe`."""

    shown_scales: int | None = None  # of what is drawn, in grids; None: all

    @functools.cached_property
    def generator(self) -> Generator:
        """A generator without weights: all that draw share what it compiles."""
        return Generator(
            self.model_config,
            {},
            self.tokenizer,
            self.prompts,
            self._recipe,
            str(self.dtype),
            device_mesh=self.mesh,
            model=self.model,
        )

    def recognized(self, params: PyTree, sets: Mapping[str, Examples]) -> dict[str, float]:
        """Return how often pictures drawn from the captions of some sets are recognized."""
        figures, options = {}, self.config.eval
        for name, examples in sets.items():
            if not len(examples):
                continue
            found = retrieval.caption_retrieval(
                self.generator.with_params(params),
                self._recipe,
                examples,
                count=options.retrieval,
                batch_size=options.sample_batch,
                between_batches=self.between_batches,
            )
            figures |= {f"{kind}_{name}": value for kind, value in found.items()}
        return figures

    def drawings(self, params: PyTree) -> dict[str, np.ndarray]:
        """Return grids of config.eval.prompts: the pictures, and how they grow scale by scale."""
        drawn, options = self.generator.with_params(params), self.config.eval
        numbers = [0] * len(options.prompts)
        codes = drawn.codes(options.prompts, numbers, self._recipe, options.sample_batch)
        growing = list(drawn.previews(codes))[: self.shown_scales]
        prompts = [(prompt, pictures.INK) for prompt in options.prompts]
        below = [[]] * (len(growing) - 1) + [prompts]
        return {
            "samples": pictures.labelled_grid([growing[-1]], captions=[prompts]),
            "scales": pictures.labelled_grid(growing, self.model_config.pyramid.labels, below),
        }
