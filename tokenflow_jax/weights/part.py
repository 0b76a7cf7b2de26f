"""A model whose weights can be converted: its variants, its shapes and its rules."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokenflow_jax.weights import rules
from tokenflow_jax.weights.rules import CheckpointMismatch, RuleTable


@dataclasses.dataclass(frozen=True)
class Part:
    """One model as the converter takes it; the functions take the model's config."""

    config_class: type  # a frozen dataclass that a checkpoint's `config["model"]` fills
    variants: Mapping[str, Any]  # configs by name
    stage: str  # the training stage whose checkpoints hold the model
    table: Callable[[Any], RuleTable]
    template: Callable[[Any], Mapping[str, Any]]  # nested shapes of the parameters
    # What is left of (config, arrays by our paths) of a checkpoint once training is over.
    finish: Callable[[Any, Mapping[str, Any]], tuple[Any, Mapping[str, Any]]] = lambda *run: run
    # Arrays that a strict load in PyTorch needs beyond the parameters.
    buffers: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    # What a file records of these weights (config, arrays by our paths).
    identify: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = lambda config, arrays: {}

    def describe(self, config: Any) -> str:
        """Return the variant's name, or the config itself if it has none."""
        names = [name for name, other in self.variants.items() if other == config]
        return f"variant {names[0]!r}" if names else str(config)

    def check(
        self, state: Mapping[str, Any], config: Any, chosen: bool = True
    ) -> Mapping[str, Any]:
        """Return a checkpoint under the model's names.

        One that does not fit raises CheckpointMismatch; where the user has chosen the config, with
        the variants that it fits, or the nearest one.
        """
        found, problems = self._fit(state, config)
        if not problems:
            return found
        others = self.variants if chosen else {}
        counts = {name: len(self._fit(state, other)[1]) for name, other in others.items()}
        fitting = [name for name, count in counts.items() if not count]
        nearest = min(counts, key=counts.__getitem__, default=None)
        remedy = f"these weights fit the variant {' and the variant '.join(fitting)}"
        if not fitting and nearest and counts[nearest] < len(problems):
            remedy = f"the nearest variant is {nearest}, with {counts[nearest]:,} of them"
        elif not fitting:
            remedy = None
        model = self.table(config).model
        raise CheckpointMismatch(model, problems, remedy, getattr(state, "path", ""))

    def _fit(
        self, state: Mapping[str, Any], config: Any
    ) -> tuple[Mapping[str, Any], rules.Problems]:
        return rules.fit(state, self.table(config), self.template(config))
