"""The one registry of stages; a stage is a folder of this package, imported when it is needed."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenflow_jax.weights.part import Part

STAGES = ("tokenizer", "generation", "understanding")


def part(stage: str) -> "Part":
    """Return what the converter needs to know of a stage's model."""
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: one of {', '.join(STAGES)}")
    return importlib.import_module(f"tokenflow_jax.{stage}.names").PART
