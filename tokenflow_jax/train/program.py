"""What the training steps of all stages have in common, as programs without weights and data."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.model import VARIANTS, TokenizerConfig
from tokenflow_jax.train import checkpoint, optim
from tokenflow_jax.weights.conversion import is_torch

PyTree = Any
_DECODERS = ("pixel_decoder", "pixel_out", "semantic_decoder", "semantic_out_1", "semantic_out_2")


@dataclasses.dataclass(frozen=True)
class StepProgram(abc.ABC):
    """Everything about a run but its weights and its data.

    Attributes:
      config: of the stage.
      mesh: of `mesh.make_mesh`.
      platform: "tpu", "gpu" or "cpu", where it will run.
    """

    config: ml_collections.ConfigDict
    mesh: mesh.Mesh
    platform: str

    def __post_init__(self):
        mesh.check_batch_size(self.config.batch_size, self.mesh, self.pack)

    @property
    def pack(self) -> int:
        """Samples of a row; only conversations share rows."""
        return self.config.get("pack", 1)

    @property
    def rows(self) -> int:
        """Rows of a global batch."""
        return self.config.batch_size // self.pack

    @property
    @abc.abstractmethod
    def trainer(self) -> Any:
        """What steps."""

    @property
    @abc.abstractmethod
    def parameters(self) -> PyTree:
        """Shapes of the model's parameters."""

    @property
    @abc.abstractmethod
    def frozen(self) -> PyTree:
        """Shapes and places of the networks that do not train."""

    @property
    @abc.abstractmethod
    def batch(self) -> PyTree:
        """Shapes and places of a global batch."""

    @property
    @abc.abstractmethod
    def parts(self) -> dict[str, PyTree]:
        """The arguments by what they are, for reports."""

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """What the trained networks compute in."""
        name = self.config.dtype
        if name == "auto":
            return jnp.dtype("float32" if self.platform == "cpu" else "bfloat16")
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {name!r} is not one of ['auto', 'float32', 'bfloat16']")
        return jnp.dtype(name)

    @functools.cached_property
    def trainable(self) -> PyTree | None:
        """Which parameters train; None when all of them do."""
        patterns = tuple(self.config.trainable)
        return optim.matching(self.parameters, patterns) if patterns else None

    @functools.cached_property
    def state(self) -> Any:
        """Shapes and places of the trainer's state."""
        state = jax.eval_shape(lambda: self.trainer.init(jax.random.key(0)))
        return mesh.placed(state, self.mesh)

    @property
    def function(self) -> Callable[..., Any]:
        """The training step, not jitted."""
        return self.trainer.step

    @property
    def arguments(self) -> tuple[PyTree, ...]:
        """Shapes and places of what the step takes."""
        return self.state, self.frozen, self.batch

    @functools.cached_property
    def step(self) -> Any:
        """The jitted step, donating the state; to be called with the mesh in use."""
        state, frozen = (
            jax.tree.map(lambda x: x.sharding, tree) for tree in (self.state, self.frozen)
        )
        return jax.jit(
            self.function,
            donate_argnums=0,
            # A batch may hold more than the step reads (labels), all of it split alike.
            in_shardings=(state, frozen, mesh.batch_sharding(self.mesh)),
            out_shardings=(state, mesh.replicated(self.mesh)),
        )


def encoder_parts(params: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a frozen tokenizer's parameters: encoders and codebooks."""
    return {name: part for name, part in params.items() if name not in _DECODERS}


def find_tokenizer_config(tokenizer: ml_collections.ConfigDict) -> TokenizerConfig:
    """The hyper-parameters of the tokenizer that `config.tokenizer` names.

    Args:
      tokenizer: `path`, of a checkpoint of ours or a PyTorch file, and `variant`, which a PyTorch
        file needs, and which is enough where shapes are.

    Raises:
      ValueError: an unknown variant, or a path without one that holds no checkpoint of ours.
    """
    path, variant = tokenizer.path, tokenizer.variant
    if variant:
        if variant not in VARIANTS:
            raise ValueError(
                f"tokenizer.variant {variant!r} is unknown; the variants are {sorted(VARIANTS)}"
            )
        return VARIANTS[variant]
    if not path or is_torch(path):
        raise ValueError(
            f"tokenizer.path {path!r}: say which model it is with --config.tokenizer.variant=, one "
            f"of {sorted(VARIANTS)}"
        )
    try:
        saved = checkpoint.read_info(checkpoint.find_checkpoint(path))["config"]
    except checkpoint.CheckpointError as error:
        raise ValueError(
            f"tokenizer.path: {error}; the quickstart's tokenizer comes from python -m "
            "tokenflow_jax.main --config=configs/tokenizer.py --workdir=runs/quickstart"
        ) from error
    if saved.get("stage") != "tokenizer":
        raise ValueError(f"tokenizer.path {path!r} is a run of stage {saved.get('stage')!r}")
    return TokenizerConfig(**saved["model"])
