"""The one registry of stages; each is a folder of this package, imported when it is needed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow_jax.train.stage import Stage
    from tokenflow_jax.weights.part import Part

# Name -> module and class of what trains. The folder's `names.PART` is what converts.
STAGES = {
    "tokenizer": "tokenflow_jax.tokenizer.stage:TokenizerStage",
    "generation": "tokenflow_jax.generation.stage:GenerationStage",
    "understanding": "tokenflow_jax.understanding.stage:UnderstandingStage",
    "unified": "tokenflow_jax.unified.stage:UnifiedStage",
}


def make_stage(config: Any, mesh: Any, platform: str | None = None) -> "Stage":
    """Return the stage of a config, not open yet (see `train.stage.Stage`).

    Args:
      config: ConfigDict with `stage`.
      mesh: from `parallel.mesh.make_mesh`, or an abstract one.
      platform: "tpu", "gpu" or "cpu" where that is not this process's own.

    Raises:
      ValueError: unknown stage, or wrong values.
    """
    module, name = stage_class(config.get("stage")).split(":")
    return getattr(importlib.import_module(module), name)(config, mesh, platform)


def stage_class(stage: str | None) -> str:
    """Return "module:class" of a stage; ValueError lists the stages there are."""
    if stage not in STAGES:
        raise ValueError(
            f"config.stage is {stage!r}; the stages available are: {', '.join(sorted(STAGES))}"
        )
    return STAGES[stage]


def part(stage: str) -> "Part":
    """Return what the converter needs to know of a stage's model."""
    stage_class(stage)
    return importlib.import_module(f"tokenflow_jax.{stage}.names").PART
