"""TokenFlow: one image tokenizer for multimodal understanding and generation, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow_jax.generation.api import Generator
    from tokenflow_jax.tokenizer.api import Tokenizer
    from tokenflow_jax.understanding.api import Assistant
    from tokenflow_jax.unified.api import Unified

__version__ = "0.1.0"
__all__ = ["Assistant", "Generator", "Tokenizer", "Unified", "__version__"]

_PARTS = {
    "Assistant": "understanding",
    "Generator": "generation",
    "Tokenizer": "tokenizer",
    "Unified": "unified",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the data pipeline's processes and `--help` do not load jax.
    if name in _PARTS:
        return getattr(importlib.import_module(f"tokenflow_jax.{_PARTS[name]}.api"), name)
    raise AttributeError(f"module 'tokenflow_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
