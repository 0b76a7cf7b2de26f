"""The entry point that lets lmms-eval find `lmms_model` without loading it."""

from typing import Any


def manifest() -> Any:
    """Register `evals.lmms_model.TokenFlow` under the name tokenflow_jax."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("tokenflow_jax", "tokenflow_jax.evals.lmms_model.TokenFlow")
