"""What lmms-eval loads to know of our model; the model itself comes with `lmms_model`."""

from typing import Any


def manifest() -> Any:
    """Registers `evals.lmms_model.TokenFlow` under the name tokenflow_jax."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("tokenflow_jax", "tokenflow_jax.evals.lmms_model.TokenFlow")
