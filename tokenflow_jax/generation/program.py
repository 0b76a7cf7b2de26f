"""The generation stage's training step as a program: shapes and places, no weights and no data.

The stage runs it; `preflight` compiles it for machines that nobody has yet.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from tokenflow_jax.data.text import PromptEncoder, PromptIds, llama2_ids, load_text_tokenizer
from tokenflow_jax.generation import sample as generate
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.generation.train import LossConfig, Trainer
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.stages import tokenizer_template
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.train.program import StepProgram, encoder_parts, find_tokenizer_config

PyTree = Any
ENCODE = ("once", "step")
CODEBOOKS = ("semantic_codebook", "pixel_codebook")


@dataclasses.dataclass(frozen=True)
class Program(StepProgram):
    """See `StepProgram`; its config is such as `configs/generation.py`."""

    @functools.cached_property
    def prompts(self) -> PromptIds:
        """The ids around prompts; those of LLaMA-2 where no text tokenizer is named."""
        text = self.config.text
        if not text.tokenizer:
            return llama2_ids(text.budget)
        return PromptEncoder(load_text_tokenizer(text.tokenizer), text.budget)

    @functools.cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """The frozen tokenizer's hyper-parameters."""
        return find_tokenizer_config(self.config.tokenizer)

    @functools.cached_property
    def model_config(self) -> GenerationConfig:
        """The model's hyper-parameters; `complete_model` says what may be left out."""
        model = complete_model(self.config.model, self.tokenizer_config, self.prompts)
        lm = dataclasses.replace(
            LMConfig(**model["lm"]), remat=self.config.remat, attention=self.config.attention
        )
        return GenerationConfig(**{**model, "lm": lm})

    @functools.cached_property
    def model(self) -> Generation:
        """The generation model."""
        return Generation(self.model_config, self.dtype)

    @functools.cached_property
    def encodes(self) -> bool:
        """Whether the step makes codes of images."""
        data = self.config.data
        if data.encode not in ENCODE:
            raise ValueError(f"data.encode {data.encode!r} is not one of {ENCODE}")
        return data.name != "codes" and data.encode == "step"

    @functools.cached_property
    def trainer(self) -> Trainer:
        """What steps."""
        config, prompts = self.config, self.prompts
        return Trainer(
            model=self.model,
            losses=LossConfig(**config.losses),
            optimizer=optim.make_optimizer(
                optim.OptimizerConfig(**config.optimizer), config.total_steps, self.trainable
            ),
            pad_id=prompts.pad_id,
            suffix=prompts.suffix,
            prefix_length=prompts.prefix_length,
            tokenizer=TokenFlow(self.tokenizer_config) if self.encodes else None,
            trainable=self.trainable,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
        )

    @functools.cached_property
    def parameters(self) -> PyTree:
        """Shapes of the model's parameters."""
        return jax.eval_shape(_untrained(self).init_params, jax.random.key(0))

    def frozen_parts(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the step reads of a tokenizer's parameters."""
        if self.encodes:
            return encoder_parts(params)
        return {name: params[name] for name in CODEBOOKS}

    @functools.cached_property
    def frozen(self) -> PyTree:
        """Shapes and places of the frozen tokenizer."""
        frozen = {"tokenizer": self.frozen_parts(tokenizer_template(self.tokenizer_config))}
        return mesh.placed(frozen, self.mesh)

    @functools.cached_property
    def batch(self) -> PyTree:
        """Shapes and places of a global batch."""
        sharding, size = mesh.batch_sharding(self.mesh), self.config.batch_size
        side = self.tokenizer_config.image_size

        def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)

        prefix = array(jnp.int32, self.prompts.prefix_length)
        if self.encodes:
            return {"prefix": prefix, "image": array(jnp.uint8, side, side, 3)}
        return {"prefix": prefix, "codes": array(jnp.int32, self.model_config.pyramid.tokens)}

    @property
    def parts(self) -> dict[str, PyTree]:
        """The same by what it is, for reports."""
        return {
            "parameters": self.state.params,
            "optimiser": self.state.opt_state,
            "average of parameters": self.state.ema,
            "frozen tokenizer": self.frozen,
            "batch": self.batch,
        }


@dataclasses.dataclass(frozen=True)
class SamplingProgram:
    """Drawing pictures as a program: guided, one pass, from prompts as long as they may be.

    Attributes:
      training: of the same model; its optimiser and its data are not looked at.
      images: drawn at a time.
    """

    training: Program
    images: int

    def __post_init__(self):
        mesh.check_batch_size(self.images, self.training.mesh)

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in, and its parameters are held in."""
        return self.training.dtype

    @functools.cached_property
    def parts(self) -> dict[str, PyTree]:
        """Shapes and places of what the sampler takes, by what it is."""
        device_mesh, length = self.training.mesh, self.training.prompts.prefix_length
        held = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype), self.training.parameters
        )
        codebooks = tokenizer_template(self.training.tokenizer_config)
        rows, whole = mesh.batch_sharding(device_mesh), mesh.replicated(device_mesh)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.images))
        return {
            "parameters": mesh.placed(held, device_mesh),
            "codebooks": mesh.placed({name: codebooks[name] for name in CODEBOOKS}, device_mesh),
            "prompts": (
                jax.ShapeDtypeStruct((self.images, length), jnp.int32, sharding=rows),
                jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows),
                jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
            ),
        }

    @property
    def arguments(self) -> tuple[PyTree, ...]:
        """Shapes and places of what `function` takes."""
        params, codebooks, prompts = self.parts.values()
        return params, Codebooks(*(codebooks[name] for name in CODEBOOKS)), *prompts

    @functools.cached_property
    def function(self) -> Callable[..., jax.Array]:
        """The sampling loop."""
        passes = tuple(map(tuple, self.training.config.sampling.passes))
        pad_id = self.training.prompts.pad_id
        return generate.Sampler(self.training.model, pad_id, passes)

    @functools.cached_property
    def step(self) -> Any:
        """The same, jitted."""
        return jax.jit(self.function)


def make_sampling_program(
    config: ml_collections.ConfigDict, device_mesh: mesh.Mesh, platform: str, images: int
) -> SamplingProgram:
    """Drawing so many pictures at a time, for `preflight`."""
    return SamplingProgram(Program(config, device_mesh, platform), images)


def _untrained(program: Program) -> Trainer:
    """A trainer good for initial weights only: shapes are needed before the optimiser is made."""
    return Trainer(program.model, LossConfig(), optax.identity(), 0, (), 0)


def make_program(
    config: ml_collections.ConfigDict, device_mesh: mesh.Mesh, platform: str
) -> Program:
    """The program of a whole run, for `preflight`."""
    return Program(config, device_mesh, platform)


def complete_model(
    model: ml_collections.ConfigDict, tokenizer: TokenizerConfig, prompts: PromptIds
) -> dict[str, Any]:
    """Fills in what the tokenizers decide, and checks what is given.

    Args:
      model: `config.model`: hyper-parameters of `GenerationConfig`, of which `scales`,
        `codebook_size`, `code_channels`, `image_start` and `lm.vocabulary_size` may be empty or 0.
      tokenizer: of the images.
      prompts: of the text.

    Returns:
      All hyper-parameters.

    Raises:
      ValueError: values that differ from what the tokenizers decide, all of them.
    """
    given = model.to_dict()
    decided = {
        "scales": tuple(tokenizer.scales),
        "codebook_size": tokenizer.codebook_size,
        "code_channels": tokenizer.code_channels,
        "image_start": prompts.image_start,
    }
    size = prompts.image_start + tokenizer.codebook_size
    problems = []
    for name, value in decided.items():
        own = tuple(given[name]) if name == "scales" else given[name]
        if own and own != value:
            problems.append(f"model.{name} is {own}, the tokenizers have {value}")
    rows = given["lm"]["vocabulary_size"] or size
    if rows < size:
        problems.append(f"model.lm.vocabulary_size {rows} does not hold {size} ids")
    if problems:
        raise ValueError("; ".join(problems) + " (0 or () takes the tokenizers' values)")
    return {**given, **decided, "lm": {**given["lm"], "vocabulary_size": rows}}
