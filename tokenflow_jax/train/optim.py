"""Optimizers, schedules and frozen parts."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

PyTree = Any

_CHOICES = {
    "name": ("adam", "adamw", "muon"),
    "schedule": ("constant", "cosine", "linear"),
    "decayed": ("kernels", "all"),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters of one optimizer."""

    # "adam", "adamw" (decoupled weight decay), or "muon": orthogonalized momentum (Jordan et al.
    # 2024) for the kernels of blocks, at AdamW's step size; AdamW with Nesterov momentum elsewhere.
    name: str = "adam"
    learning_rate: float = 1e-4  # peak
    schedule: str = "constant"  # or "cosine", "linear": decay to final_fraction of the peak
    warmup_steps: int = 0  # of linear warm-up from zero
    final_fraction: float = 0.0  # of the peak, reached at the last step
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # for adamw and muon
    decayed: str = "kernels"  # or "all" but biases and norms (embeddings and position tables, too)
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down; 0: never

    def __post_init__(self):
        problems = [
            f"{field} {getattr(self, field)!r} is not one of {choices}"
            for field, choices in _CHOICES.items()
            if getattr(self, field) not in choices
        ]
        if self.learning_rate < 0 or self.warmup_steps < 0 or self.clip_norm < 0:
            problems.append("learning_rate, warmup_steps and clip_norm must not be negative")
        if self.weight_decay and self.name == "adam":
            problems.append(f"weight_decay {self.weight_decay} needs name='adamw' or 'muon'")
        if problems:
            raise ValueError("optimizer: " + "; ".join(problems))


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_fraction
    decay_steps = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        end = warmup + decay_steps
        start = 0.0 if warmup else peak
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, end, peak * final)
    if config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * final, decay_steps)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def make_optimizer(
    config: OptimizerConfig, total_steps: int, trainable: PyTree | None = None
) -> optax.GradientTransformation:
    """Return clipping, then Adam, AdamW or Muon, with a schedule that ends at `total_steps`.

    `trainable` is a pytree of bools shaped like the parameters, or None when all of them train;
    those marked False never move and have no optimizer state.
    """
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    schedule, mask = make_schedule(config, total_steps), _MASKS[config.decayed]
    if config.name == "muon":
        parts.append(
            optax.contrib.muon(
                schedule,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                weight_decay_mask=mask,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=_hidden_matrices,
                consistent_rms=0.2,  # root mean square of AdamW's updates
            )
        )
    else:
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.epsilon))
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
        parts.append(optax.scale_by_learning_rate(schedule))
    if trainable is None:
        return optax.chain(*parts)
    labels = jax.tree.map(lambda trains: "trains" if trains else "frozen", trainable)
    transforms = {"trains": optax.chain(*parts), "frozen": optax.set_to_zero()}
    return optax.multi_transform(transforms, labels)


def _hidden_matrices(params: PyTree) -> PyTree:
    """Mark the kernels of hidden layers as matrices, per layer of a scan; None for the rest."""

    def matrix(name, leaf):
        if not re.search(r"blocks/.*kernel$", name) or leaf.ndim not in (2, 3):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return _map_with_name(matrix, params)


def _is_matrix(params: PyTree) -> PyTree:
    """Mark kernels; norms, biases and position embeddings are not decayed."""
    return _map_with_name(lambda name, _: name.endswith("kernel"), params)


def _is_no_bias_or_norm(params: PyTree) -> PyTree:
    """Mark everything but biases and the scales of norms."""
    return _map_with_name(lambda name, _: not name.endswith(("bias", "scale")), params)


_MASKS = {"kernels": _is_matrix, "all": _is_no_bias_or_norm}


def _map_with_name(function: Callable[[str, Any], Any], params: PyTree) -> PyTree:
    """Map (name, parameter), where the name is a path such as "pixel_decoder/conv_in/kernel"."""

    def call(path, leaf):
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree.map_with_path(call, params)


def update(
    optimizer: optax.GradientTransformation, gradients: PyTree, opt_state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Return the parameters after an optimizer's step, and its new state."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def matching(params: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """Mark the parameters whose path matches a pattern.

    The patterns are regular expressions, matched from the start of paths such as
    "pixel_decoder/conv_in/kernel". Those that match nothing are a ValueError.
    """
    paths = _map_with_name(lambda name, _: name, params)
    names = jax.tree.leaves(paths)
    unused = [p for p in patterns if not any(re.match(p, name) for name in names)]
    if unused:
        parts = sorted({name.split("/")[0] for name in names})
        raise ValueError(f"no parameter matches {unused}; the parts are {parts}")
    return jax.tree.map(lambda name: any(re.match(p, name) for p in patterns), paths)


@dataclasses.dataclass(frozen=True)
class Whole:
    """What an optimizer sees of the parameters: all, of which unmarked ones get no gradient.

    `weights.lora.Adapters` is the other kind, whose optimizer sees only what trains.
    """

    trainable: PyTree | None = None

    def take(self, params: PyTree) -> PyTree:
        """Return what the optimizer updates and the moving average follows."""
        return params

    def put(self, params: PyTree, trained: PyTree) -> PyTree:
        """Return the parameters with what `take` gave replaced."""
        return trained

    def join(self, params: PyTree, trained: PyTree) -> PyTree:
        """Return what the model computes with, as a function of `trained`."""
        return trained if self.trainable is None else freeze(trained, self.trainable)


def freeze(params: PyTree, trainable: PyTree) -> PyTree:
    """Stop the gradient of unmarked parameters, so that their backward pass is never built."""
    return jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, trainable)
