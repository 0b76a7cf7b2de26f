"""The unified model's names in files of PyTorch's kind, and what the converter is handed.

No checkpoint of this model was released: the decoder has Hugging Face's names, what reads those of
the understanding model, what writes those of the generation model, but for its projector.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from tokenflow_jax.unified.model import VARIANTS, Unified, UnifiedConfig
from tokenflow_jax.weights.names.decoder import decoder_rules
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import Rule, RuleTable, layer


def unified_table(config: UnifiedConfig) -> RuleTable:
    """Return the rules of a model."""
    linear = config.read_projector == "linear"
    read = (("fc1", ""),) if linear else (("fc1", ".0"), ("fc2", ".2"))
    projectors = [
        *((f"read_projector/{ours}", f"model.mm_projector{theirs}") for ours, theirs in read),
        ("write_projector/fc1", "model.write_projector.0"),
        ("write_projector/fc2", "model.write_projector.2"),
    ]
    return RuleTable(
        "unified model",
        (
            *decoder_rules("lm/"),
            *(rule for ours, theirs in projectors for rule in layer(ours, theirs)),
            Rule("level_embedding", "model.lvl_embed.weight"),
            Rule("position_embedding", "model.pos_1LC"),
        ),
        ignored=("*.rotary_emb.inv_freq", *["lm_head.weight"] * config.lm.tied_head),
    )


@functools.cache
def unified_template(config: UnifiedConfig) -> Mapping[str, Any]:
    """Return the shapes of the model's parameters, without computing any."""
    return jax.eval_shape(Unified(config).init_params, jax.random.key(0))


PART = Part(
    config_class=UnifiedConfig,
    variants=VARIANTS,
    stage="unified",
    table=unified_table,
    template=unified_template,
)
