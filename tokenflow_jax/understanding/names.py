"""The understanding model's names in the reference's checkpoints, and what the converter is handed.

The released layout is a Hugging Face folder of Qwen2 (or Llama) whose weights also hold the
projector: `model.mm_projector.0` and `.2`, or `model.mm_projector` where it is linear.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from tokenflow_jax.understanding.model import VARIANTS, Understanding, UnderstandingConfig
from tokenflow_jax.weights.names.decoder import decoder_rules
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import RuleTable, layer


def understanding_table(config: UnderstandingConfig) -> RuleTable:
    """Return the rules of a model."""
    names = {"linear": (("fc1", ""),)}.get(config.projector, (("fc1", ".0"), ("fc2", ".2")))
    projector = (
        rule
        for ours, theirs in names
        for rule in layer(f"projector/{ours}", f"model.mm_projector{theirs}")
    )
    ignored = ("*.rotary_emb.inv_freq", "model.vision_tower.*")
    if config.lm.tied_head:
        ignored = (*ignored, "lm_head.weight")
    return RuleTable("understanding model", (*decoder_rules("lm/"), *projector), ignored=ignored)


@functools.cache
def understanding_template(config: UnderstandingConfig) -> Mapping[str, Any]:
    """Return the shapes of the model's parameters, without computing any."""
    return jax.eval_shape(Understanding(config).init_params, jax.random.key(0))


PART = Part(
    config_class=UnderstandingConfig,
    variants=VARIANTS,
    stage="understanding",
    table=understanding_table,
    template=understanding_template,
)
