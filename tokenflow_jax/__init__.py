"""TokenFlow: one image tokenizer for multimodal understanding and generation, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow_jax.api import Tokenizer
    from tokenflow_jax.assistant import Assistant

__version__ = "0.1.0"
__all__ = ["Assistant", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the data pipeline's processes and `--help` do not load jax.
    if name == "Assistant":
        from tokenflow_jax.assistant import Assistant

        return Assistant
    if name == "Tokenizer":
        from tokenflow_jax.api import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'tokenflow_jax' has no attribute {name!r}")
