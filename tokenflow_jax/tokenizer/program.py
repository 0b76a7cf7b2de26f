"""The tokenizer's training step as a program: shapes and places, no weights and no data.

The stage runs it; `preflight` compiles it for machines that nobody has yet.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from tokenflow_jax.nets.discriminator import make_discriminator
from tokenflow_jax.nets.lpips import LPIPS, lpips_template
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.state import CodebookConfig, LossConfig
from tokenflow_jax.tokenizer.teacher import TeacherSpec, teacher_spec
from tokenflow_jax.tokenizer.train import Trainer
from tokenflow_jax.train import optim
from tokenflow_jax.train.program import StepProgram

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program(StepProgram):
    """See `StepProgram`; its config is such as `configs/tokenizer.py`.

    Attributes:
      perceptual: whether LPIPS is part of it (its weights are there).
    """

    perceptual: bool

    @functools.cached_property
    def model_config(self) -> TokenizerConfig:
        """The tokenizer's hyper-parameters."""
        return TokenizerConfig(**self.config.model.to_dict())

    @functools.cached_property
    def model(self) -> TokenFlow:
        """The tokenizer."""
        return TokenFlow(self.model_config, self.dtype, self.config.remat)

    @functools.cached_property
    def teacher(self) -> TeacherSpec | None:
        """The frozen teacher without its weights."""
        return teacher_spec(self.config.teacher, self.model_config.semantic_encoder, self.dtype)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """What steps."""
        config, teacher = self.config, self.teacher
        losses = LossConfig(**config.losses)
        if teacher is None and losses.distillation_weight:
            raise ValueError(
                "losses.distillation_weight needs a teacher; set it to 0 with teacher.source='none'"
            )
        width = self.model_config.teacher_width
        if teacher is not None and width != teacher.width:
            raise ValueError(f"model.teacher_width {width} is not the teacher's {teacher.width}")
        discriminator = make_discriminator(**config.discriminator, dtype=self.dtype)
        return Trainer(
            model=self.model,
            losses=losses,
            codebook=CodebookConfig(**config.codebook),
            optimizer=_optimizer(config.optimizer, config.total_steps, self.trainable),
            discriminator_optimizer=_optimizer(config.discriminator_optimizer, config.total_steps),
            teacher=teacher.module if teacher else None,
            **{"teacher_mean": teacher.mean, "teacher_std": teacher.std} if teacher else {},
            discriminator=discriminator if losses.adversarial_weight else None,
            lpips=LPIPS(dtype=self.dtype) if self.perceptual else None,
            trainable=self.trainable,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            seed=config.seed,
        )

    @functools.cached_property
    def parameters(self) -> PyTree:
        """Shapes of the tokenizer's parameters."""
        return _parameters(self.model, self.model_config.image_size)

    @functools.cached_property
    def frozen(self) -> PyTree:
        """Shapes and places of the networks that only judge."""
        frozen = {}
        if self.teacher is not None:
            frozen["teacher"] = _parameters(self.teacher.module, self.teacher.image_size)
        if self.perceptual:
            frozen["lpips"] = lpips_template()
        return mesh.placed(frozen, self.mesh)

    @functools.cached_property
    def batch(self) -> PyTree:
        """Shape and place of a global batch."""
        size = self.model_config.image_size
        shape = (self.config.batch_size, size, size, 3)
        sharding = mesh.batch_sharding(self.mesh)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)}

    @property
    def parts(self) -> dict[str, PyTree]:
        """The same by what it is, for reports."""
        state = self.state
        return {
            "parameters": state.params,
            "optimiser": state.opt_state,
            "average of parameters": state.ema,
            "discriminator": state.discriminator,
            "usage and sums of codes": (state.usage, state.codebook),
            "frozen networks": self.frozen,
            "batch": self.batch,
        }


def make_program(
    config: ml_collections.ConfigDict, device_mesh: mesh.Mesh, platform: str
) -> Program:
    """The program of a whole run, for `preflight`: LPIPS included if the config asks for it."""
    return Program(config, device_mesh, platform, bool(config.losses.perceptual_weight))


def _parameters(module: nn.Module, image_size: int) -> PyTree:
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def _optimizer(
    config: ml_collections.ConfigDict, total_steps: int, trainable: PyTree | None = None
) -> optax.GradientTransformation:
    return optim.make_optimizer(optim.OptimizerConfig(**config), total_steps, trainable)
