"""Rules and part of the generation model, by the names of the reference's checkpoints."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.weights.names.decoder import decoder_rules
from tokenflow_jax.weights.rules import DENSE, Rule, RuleTable


def generation_table(config: GenerationConfig) -> RuleTable:
    """The rules; a checkpoint may hold the ids of the first and the last code, which are handed on.

    Args:
      config: of the model; one table serves all of them.
    """
    projector = [
        rule
        for ours, theirs in (("fc1", 0), ("fc2", 2))
        for rule in (
            Rule(f"projector/{ours}/kernel", f"model.mm_projector.{theirs}.weight", DENSE),
            Rule(f"projector/{ours}/bias", f"model.mm_projector.{theirs}.bias"),
        )
    ]
    return RuleTable(
        "generation model",
        (
            *decoder_rules("lm/"),
            *projector,
            Rule("level_embedding", "model.lvl_embed.weight"),
            Rule("position_embedding", "model.pos_1LC"),
        ),
        buffers=("*image_token_start", "*image_token_end"),
        ignored=("*.rotary_emb.inv_freq",),
    )


@functools.cache
def generation_template(config: GenerationConfig) -> Mapping[str, Any]:
    """Shapes of the model's parameters, without computing any."""
    codes = config.pyramid.tokens
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = (
        ids,
        jax.ShapeDtypeStruct((1, 2), jnp.bool_),
        jax.ShapeDtypeStruct((1, codes), jnp.int32),
        jax.ShapeDtypeStruct((1, codes - 1, config.code_channels), jnp.float32),
        ids,
    )
    init = functools.partial(Generation(config).init, method="losses")
    return jax.eval_shape(init, jax.random.key(0), *shapes)["params"]


def generation_buffers(config: GenerationConfig) -> dict[str, np.ndarray]:
    """Nothing beyond the parameters is needed."""
    return {}
