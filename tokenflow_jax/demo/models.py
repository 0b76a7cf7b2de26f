"""What the page can do, by the checkpoints that it was given."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from tokenflow_jax.generation.api import Generator
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.understanding.api import Assistant
from tokenflow_jax.unified import start
from tokenflow_jax.unified.api import Unified

_LOADERS: dict[str, Callable[..., Any]] = {
    "tokenizer": Tokenizer.load,
    "generation": Generator.load,
    "understanding": Assistant.load,
    "unified": Unified.load,
}


@dataclasses.dataclass(frozen=True)
class Models:
    """The loaded models; None is what no checkpoint can do."""

    tokenizer: Tokenizer
    generator: Generator | None = None
    assistant: Assistant | None = None

    @property
    def draws_in_chat(self) -> bool:
        """The assistant draws, too."""
        return isinstance(self.assistant, Unified)


def load(paths: Sequence[str], tokenizer: str | None = None) -> Models:
    """Load checkpoints: a tokenizer, and models that draw, answer or do both.

    Args:
      paths: of each stage at most one, in any order; a language model brings its tokenizer.
      tokenizer: of language models that do not record theirs, or whose folder has moved.

    Raises:
      ValueError: two models for the same, or a path that cannot be loaded.
    """
    tokenizers, found = [], {}
    for path in map(os.fspath, paths):
        stage = start.stage_of(path)
        if stage not in _LOADERS:
            raise ValueError(f"{path} does not record which model it is: convert it first")
        if stage == "tokenizer":
            tokenizers.append(Tokenizer.load(path))
            continue
        model = _LOADERS[stage](path, **({"tokenizer": tokenizer} if tokenizer else {}))
        tokenizers.append(model.tokenizer)
        can = {"generation": ("generator",), "understanding": ("assistant",)}
        for role in can.get(stage, ("generator", "assistant")):
            if role in found:
                raise ValueError(f"{path}: another checkpoint is the {role} already")
            generator = stage == "unified" and role == "generator"
            found[role] = model.generator if generator else model
    if not tokenizers:
        raise ValueError("no checkpoint was given")
    return Models(tokenizers[0], **found)
