"""The generation model's names in the reference's checkpoints, and what the converter is handed."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from tokenflow_jax.generation.model import VARIANTS, Generation, GenerationConfig
from tokenflow_jax.weights.names.decoder import decoder_rules
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import Rule, RuleTable, layer


def generation_table(config: GenerationConfig) -> RuleTable:
    """Return the rules, the same for all configs."""
    return RuleTable(
        "generation model",
        (
            *decoder_rules("lm/"),
            *layer("projector/fc1", "model.mm_projector.0"),
            *layer("projector/fc2", "model.mm_projector.2"),
            Rule("level_embedding", "model.lvl_embed.weight"),
            Rule("position_embedding", "model.pos_1LC"),
        ),
        buffers=("*image_token_start", "*image_token_end"),  # ids of the first and the last code
        ignored=("*.rotary_emb.inv_freq",),
    )


@functools.cache
def generation_template(config: GenerationConfig) -> Mapping[str, Any]:
    """Return the shapes of the model's parameters, without computing any."""
    return jax.eval_shape(Generation(config).init_params, jax.random.key(0))


PART = Part(
    config_class=GenerationConfig,
    variants=VARIANTS,
    stage="generation",
    table=generation_table,
    template=generation_template,
)
