"""Options of a tokenizer run, and the state it carries from step to step."""

import dataclasses
from typing import Any

import flax.struct
import jax

from tokenflow_jax.tokenizer import losses as adversarial
from tokenflow_jax.tokenizer.codebook import EMACodebook, Usage
from tokenflow_jax.tokenizer.quantizer import Codebooks

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which losses train, and their weights.

    Attributes:
      pixel: "l2" or "l1" between images.
      perceptual_weight: of LPIPS; the term is left out where its weights are missing.
      perceptual_dropout: restores the dropout that the reference leaves on in LPIPS by accident.
      distillation_weight: of 1 - cosine to the teacher's patch features.
      commitment_weight: beta in the paper.
      entropy_weight: of `quantizers.entropy_loss`; 0 leaves it out of the program.
      scale_drop: probability that a step leaves one scale out.
      adversarial: the discriminator's loss, a key of `losses.DISCRIMINATOR_LOSSES`.
      generator_adversarial: the generator's, a key of `losses.GENERATOR_LOSSES`.
      adversarial_weight: of both; 0 leaves the discriminator out of the program.
      discriminator_start: step from which the adversarial losses count.
      adaptive: scales the generator's adversarial term by the ratio of gradient norms.
    """

    pixel: str = "l2"
    perceptual_weight: float = 1.0
    perceptual_dropout: bool = False
    distillation_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    scale_drop: float = 0.1
    adversarial: str = "hinge"
    generator_adversarial: str = "hinge"
    adversarial_weight: float = 0.5
    discriminator_start: int = 0
    adaptive: bool = False

    def __post_init__(self):
        problems = []
        choices = {
            "pixel": ("l1", "l2"),
            "adversarial": tuple(adversarial.DISCRIMINATOR_LOSSES),
            "generator_adversarial": tuple(adversarial.GENERATOR_LOSSES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} {getattr(self, name)!r} is not one of {allowed}")
        if not 0 <= self.scale_drop <= 1:
            problems.append(f"scale_drop {self.scale_drop} is not a probability")
        if problems:
            raise ValueError("losses: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """How the codebooks start and learn; the defaults are the paper's.

    Attributes:
      init: "uniform", or "kmeans" of the first batch's tokens.
      update: "gradient", or "ema" (moving average of the tokens, no gradient).
      ema_decay: for update="ema".
      revive_every: steps between replacements of unused codes by tokens; 0: never.
      usage_window: codes in the sliding window of the usage statistics.
    """

    init: str = "uniform"
    update: str = "gradient"
    ema_decay: float = 0.99
    revive_every: int = 0
    usage_window: int = 131072

    def __post_init__(self):
        for name, allowed in (("init", ("uniform", "kmeans")), ("update", ("gradient", "ema"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"codebook.{name} {getattr(self, name)!r} is not one of {allowed}")


class Discriminator(flax.struct.PyTreeNode):
    """The discriminator's weights, BatchNorm statistics and optimizer state."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step; unused parts are None.

    Attributes:
      step: int32, steps done.
      params, opt_state: of the tokenizer.
      ema: moving average of params.
      discriminator: None without an adversarial loss.
      usage: the sliding window of codes.
      codebook: running sums, for codebook.update="ema".
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    discriminator: Discriminator | None
    usage: Usage
    codebook: EMACodebook | None


def codebooks_of(params: PyTree) -> Codebooks:
    """Return the codebooks among the tokenizer's parameters."""
    return Codebooks(params["semantic_codebook"], params["pixel_codebook"])


def with_codebooks(params: PyTree, codebooks: Codebooks) -> PyTree:
    """Return the parameters with other codebooks."""
    return params | {
        "semantic_codebook": codebooks.semantic_KC,
        "pixel_codebook": codebooks.pixel_KC,
    }
