"""The parts of TokenFlow that can be converted, each with its variants and its rules."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.generation import model as generation
from tokenflow_jax.generation.names import (
    generation_buffers,
    generation_table,
    generation_template,
)
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import tokenizer_buffers, tokenizer_table
from tokenflow_jax.understanding import model as understanding
from tokenflow_jax.understanding.names import understanding_table, understanding_template
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.rules import CheckpointMismatch, RuleTable


@dataclasses.dataclass(frozen=True)
class Part:
    """A model with its variants.

    Attributes:
      config_class: of the frozen dataclass that a checkpoint's `config["model"]` fills.
      variants: configs by name.
      stage: the training stage whose checkpoints hold it.
      table: config -> rules.
      template: config -> nested shapes of the parameters.
      buffers: config -> what a strict load in PyTorch wants beyond the parameters.
    """

    config_class: type
    variants: Mapping[str, Any]
    stage: str
    table: Callable[[Any], RuleTable]
    template: Callable[[Any], Mapping[str, Any]]
    buffers: Callable[[Any], dict[str, np.ndarray]]

    def describe(self, config: Any) -> str:
        """The variant's name, or the config itself if it has none."""
        names = [name for name, other in self.variants.items() if other == config]
        return f"variant {names[0]!r}" if names else str(config)

    def check(self, state: Mapping[str, Any], config: Any) -> None:
        """Compares a PyTorch checkpoint with the model, without reading data.

        Args:
          state: torch names to anything with shape and dtype.
          config: of the model.

        Raises:
          CheckpointMismatch: all problems, and the variants that would fit.
        """
        problems = self._problems(state, config)
        if not problems:
            return
        fitting = [n for n, other in self.variants.items() if not self._problems(state, other)]
        remedy = f"these weights fit the variant {' and the variant '.join(fitting)}"
        model = self.table(config).model
        raise CheckpointMismatch(model, problems, remedy if fitting else None)

    def _problems(self, state: Mapping[str, Any], config: Any) -> rules.Problems:
        return rules.check(state, self.table(config), self.template(config))


@functools.cache
def tokenizer_template(config: TokenizerConfig) -> Mapping[str, Any]:
    """Shapes of the tokenizer's parameters, without computing any."""
    size = config.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(TokenFlow(config).init, jax.random.key(0), image)["params"]


PARTS = {
    "tokenizer": Part(
        config_class=TokenizerConfig,
        variants=VARIANTS,
        stage="tokenizer",
        table=tokenizer_table,
        template=tokenizer_template,
        buffers=tokenizer_buffers,
    ),
    "generation": Part(
        config_class=generation.GenerationConfig,
        variants=generation.VARIANTS,
        stage="generation",
        table=generation_table,
        template=generation_template,
        buffers=generation_buffers,
    ),
    "understanding": Part(
        config_class=understanding.UnderstandingConfig,
        variants=understanding.VARIANTS,
        stage="understanding",
        table=understanding_table,
        template=understanding_template,
        buffers=lambda config: {},
    ),
}
