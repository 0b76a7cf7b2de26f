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
    # Arrays that a strict load in PyTorch needs beyond the parameters.
    buffers: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}

    def describe(self, config: Any) -> str:
        """Return the variant's name, or the config itself if it has none."""
        names = [name for name, other in self.variants.items() if other == config]
        return f"variant {names[0]!r}" if names else str(config)

    def check(self, state: Mapping[str, Any], config: Any) -> None:
        """Raise CheckpointMismatch with all problems and the variants that the file would fit."""
        problems = self._problems(state, config)
        if not problems:
            return
        fitting = [n for n, other in self.variants.items() if not self._problems(state, other)]
        remedy = f"these weights fit the variant {' and the variant '.join(fitting)}"
        model = self.table(config).model
        raise CheckpointMismatch(model, problems, remedy if fitting else None)

    def _problems(self, state: Mapping[str, Any], config: Any) -> rules.Problems:
        return rules.check(state, self.table(config), self.template(config))
