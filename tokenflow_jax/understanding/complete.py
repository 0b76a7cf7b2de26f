"""What the tokenizers decide about the model that reads."""

from typing import Any

from tokenflow_jax.data.text import load_text_tokenizer
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.understanding.model import feature_channels


def complete_model(
    given: dict[str, Any], tokenizer: TokenizerConfig, text_tokenizer: str
) -> dict[str, Any]:
    """Fill in what the tokenizers decide: `vision_channels` and `lm.vocabulary_size` may be 0.

    Without the name of a text tokenizer the vocabulary's size must be given.

    Raises:
      ValueError: values that do not go with the tokenizers, all of them.
    """
    problems = []
    channels = feature_channels(
        tokenizer.semantic_channels, tokenizer.pixel_channels, given["strategy"]
    )
    if given["vision_channels"] not in (0, channels):
        problems.append(
            f"model.vision_channels is {given['vision_channels']}, the tokenizer's features have "
            f"{channels} with model.strategy={given['strategy']!r} (0 takes that)"
        )
    rows = given["lm"]["vocabulary_size"]
    if text_tokenizer:
        size = len(load_text_tokenizer(text_tokenizer))
        rows = rows or size
        if rows < size:
            problems.append(f"model.lm.vocabulary_size {rows} does not hold {size} ids of text")
    elif not rows:
        problems.append("text_tokenizer or model.lm.vocabulary_size must be given")
    if problems:
        raise ValueError("; ".join(problems))
    lm = {**given["lm"], "vocabulary_size": rows}
    return {**given, "vision_channels": channels, "lm": lm}
