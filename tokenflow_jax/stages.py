"""The one registry of stages: what trains, and what converts."""

import importlib
from typing import Any

# Stage -> module with its class; imported only when chosen, so that commands start fast.
STAGES = {
    "tokenizer": "tokenflow_jax.tokenizer.stage:TokenizerStage",
    "generation": "tokenflow_jax.generation.stage:GenerationStage",
    "understanding": "tokenflow_jax.understanding.stage:UnderstandingStage",
}


def make_stage(config: Any, mesh: Any, platform: str | None = None) -> Any:
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
