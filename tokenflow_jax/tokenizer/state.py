"""Options of a tokenizer run, and the state it carries from step to step."""

import dataclasses
from typing import Any

import flax.struct
import jax

from tokenflow_jax.tokenizer import losses as adversarial
from tokenflow_jax.tokenizer.codebook import EMACodebook, Usages

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses that train, and their weights; 0 leaves a loss out of the program."""

    pixel: str = "l2"  # or l1, between images
    perceptual_weight: float = 1.0  # of LPIPS, which is left out where its weights are missing
    perceptual_dropout: bool = False  # the dropout that the reference leaves on by accident
    distillation_weight: float = 1.0  # of 1 - cosine to the teacher's patch features
    commitment_weight: float = 0.25  # beta in the paper
    entropy_weight: float = 0.0  # of `quantizer.entropy_loss`
    scale_drop: float = 0.1  # probability that a step leaves one scale out
    adversarial: str = "hinge"  # a key of `losses.DISCRIMINATOR_LOSSES`
    generator_adversarial: str = "hinge"  # a key of `losses.GENERATOR_LOSSES`
    adversarial_weight: float = 0.5  # of both
    discriminator_start: int = 0  # first step in which the adversarial losses count
    adaptive: bool = False  # scale the generator's adversarial term by a ratio of gradient norms

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
    """Initialization and learning of the codebooks; the defaults are the paper's."""

    init: str = "uniform"  # or kmeans of the first batches' tokens
    learning: str = "gradient"  # or ema: a moving average of the tokens, no gradient
    ema_decay: float = 0.99
    revive_every: int = 0  # steps between replacements of unused codes by tokens; 0: never
    usage_window: int = 131072  # codes in the sliding window of the usage statistics

    def __post_init__(self):
        for name, allowed in (("init", ("uniform", "kmeans")), ("learning", ("gradient", "ema"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"codebook.{name} {getattr(self, name)!r} is not one of {allowed}")


class Discriminator(flax.struct.PyTreeNode):
    """The discriminator's weights, BatchNorm statistics and optimizer state."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step; unused parts are None."""

    step: jax.Array  # int32, steps done
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None  # moving average of params
    discriminator: Discriminator | None
    usage: Usages
    codebook: EMACodebook | None  # running sums, for codebook.learning="ema"
