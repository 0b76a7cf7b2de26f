"""The understanding stage's training step as a program: shapes and places, no weights and no data.

The stage runs it; `preflight` compiles it for machines that nobody has yet.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax.data.text import load_text_tokenizer
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import tokenizer_template
from tokenflow_jax.train import optim
from tokenflow_jax.train.program import StepProgram, encoder_parts, find_tokenizer_config
from tokenflow_jax.understanding.model import (
    Understanding,
    UnderstandingConfig,
    feature_channels,
    vectors_per_image,
)
from tokenflow_jax.understanding.names import understanding_template
from tokenflow_jax.understanding.train import Trainer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program(StepProgram):
    """See `StepProgram`; its config is such as `configs/understanding.py`.

    Attributes:
      images: how many pictures have a row in the table of features; 0 tokenizes them in the step.
    """

    images: int = 0

    @functools.cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """The frozen tokenizer's hyper-parameters."""
        return find_tokenizer_config(self.config.tokenizer)

    @functools.cached_property
    def model_config(self) -> UnderstandingConfig:
        """The model's hyper-parameters; `complete_model` says what may be left out."""
        model = complete_model(self.config, self.tokenizer_config)
        lm = dataclasses.replace(
            LMConfig(**model["lm"]), remat=self.config.remat, attention=self.config.attention
        )
        return UnderstandingConfig(**{**model, "lm": lm})

    @property
    def vectors(self) -> int:
        """Vectors of an image."""
        return vectors_per_image(self.tokenizer_config.pyramid, self.model_config.strategy)

    @functools.cached_property
    def model(self) -> Understanding:
        """The understanding model."""
        return Understanding(self.model_config, self.dtype)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """What steps."""
        config = self.config
        options = optim.OptimizerConfig(**config.optimizer)
        return Trainer(
            self.model,
            TokenFlow(self.tokenizer_config),
            optim.make_optimizer(options, config.total_steps, self.trainable),
            self.trainable,
            config.accumulate,
            config.loss_tokens,
        )

    @functools.cached_property
    def parameters(self) -> PyTree:
        """Shapes of the model's parameters."""
        return understanding_template(self.model_config)

    @functools.cached_property
    def frozen(self) -> PyTree:
        """Shapes and places of the frozen tokenizer, or of the features it has made."""
        if self.images:
            shape = (self.images, self.vectors, self.model_config.vision_channels)
            frozen: PyTree = {"features": jax.ShapeDtypeStruct(shape, jnp.float32)}
        else:
            frozen = {"tokenizer": encoder_parts(tokenizer_template(self.tokenizer_config))}
        return mesh.placed(frozen, self.mesh)

    @functools.cached_property
    def batch(self) -> PyTree:
        """Shapes and places of a global batch of the longest rows."""
        sharding, pack = mesh.batch_sharding(self.mesh), self.pack
        side = self.tokenizer_config.image_size

        def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=sharding)

        names = ("ids", "labels", "places", "segments")
        length = pack * self.config.data.max_length
        tokens = {name: array(jnp.int32, length) for name in names}
        if self.images:
            return {**tokens, "image_index": array(jnp.int32, pack)}
        return {**tokens, "image": array(jnp.uint8, pack, side, side, 3)}

    @property
    def parts(self) -> dict[str, PyTree]:
        """The same by what it is, for reports."""
        return {
            "parameters": self.state.params,
            "optimiser": self.state.opt_state,
            "frozen tokenizer": self.frozen,
            "batch": self.batch,
        }


def make_program(
    config: ml_collections.ConfigDict, device_mesh: mesh.Mesh, platform: str
) -> Program:
    """The program of a whole run, for `preflight`: pictures are tokenized in the step."""
    return Program(config, device_mesh, platform)


def complete_model(config: ml_collections.ConfigDict, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Fills in what the tokenizers decide, and checks what is given.

    Args:
      config: with `model`, hyper-parameters of `UnderstandingConfig`, of which `vision_channels`
        and `lm.vocabulary_size` may be 0.
      tokenizer: of the images.

    Returns:
      All hyper-parameters.

    Raises:
      ValueError: values that do not go with the tokenizers, all of them.
    """
    given, problems = config.model.to_dict(), []
    channels = feature_channels(
        tokenizer.semantic_channels, tokenizer.pixel_channels, given["strategy"]
    )
    if given["vision_channels"] not in (0, channels):
        problems.append(
            f"model.vision_channels is {given['vision_channels']}, the tokenizer's features have "
            f"{channels} with model.strategy={given['strategy']!r} (0 takes that)"
        )
    rows = given["lm"]["vocabulary_size"]
    if config.data.text_tokenizer:
        size = len(load_text_tokenizer(config.data.text_tokenizer))
        rows = rows or size
        if rows < size:
            problems.append(f"model.lm.vocabulary_size {rows} does not hold {size} ids of text")
    elif not rows:
        problems.append("data.text_tokenizer or model.lm.vocabulary_size must be given")
    if problems:
        raise ValueError("; ".join(problems))
    lm = {**given["lm"], "vocabulary_size": rows}
    return {**given, "vision_channels": channels, "lm": lm}
