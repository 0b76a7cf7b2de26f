"""The contract between a stage of training and the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.train import checkpoint

State = Any  # a flax.struct pytree with an int32 scalar `.step`
Batch = Any  # a pytree of global jax.Arrays


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage hands to the loop. `train/<stage>.py` builds it in `make_stage(config, mesh)`.

    Attributes:
      name: for logs and the report, for example "tokenizer".
      init: returns the initial state from scratch, sharded: a flax.struct pytree of arrays with an
        int32 scalar `.step` = 0. Every floating array in it must stay finite.
      step: (state, frozen, batch) -> (state, metrics). Jitted, donates the state. `metrics` holds
        scalars: "loss/total" and whatever else is worth a curve; every "loss/*" must be finite.
      train_data: returns the infinite data iterator of this process's share of the batches (see
        `mesh.batch_share`): a `data.dealing.DealtBatches`, or anything with `__next__`, `get_state`
        and `set_state(states of all shares)`; batches are pytrees of host-local NumPy arrays.
      batch_sharding: how a global batch lies on the devices.
      evaluate: state -> held-out figures; names get the prefix "eval/" when they lack it.
      visualize: state -> grids, name -> uint8 (height, width, 3).
      images_per_step: images per optimiser step over all processes, for images/s.
      warm_start: applies config.init_from to a fresh state; returns it and a text of what was
        loaded from where. None when config.init_from is empty.
      frozen: weights that `step` reads and never changes (a teacher, LPIPS); not checkpointed.
      notes: lines to log at the start and print in the report ("trained without LPIPS: ...").
      final_notes: called at the end, returns lines such as the pictures that were skipped.
      headline: metrics of the progress line, in order; all losses when empty.
    """

    name: str
    init: Callable[[], State]
    step: Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]
    train_data: Callable[[], Any]
    batch_sharding: jax.sharding.NamedSharding
    evaluate: Callable[[State], Mapping[str, float]]
    visualize: Callable[[State], Mapping[str, np.ndarray]]
    images_per_step: int
    warm_start: Callable[[State], tuple[State, str]] | None = None
    frozen: Any = None
    notes: list[str] = dataclasses.field(default_factory=list)
    final_notes: Callable[[], list[str]] | None = None
    headline: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """The part of the config that the loop reads; a field that the config lacks has this default.

    Attributes:
      total_steps: optimiser steps of the whole run, restored ones included.
      log_every: steps between progress lines and points of the curves.
      eval_every: steps between evaluations; 0 only at the end.
      image_every: steps between image grids; 0 only at the end.
      checkpoint_every: steps between checkpoints; 0 only at the end.
      keep_checkpoints: how many of the latest checkpoints stay on disk.
    """

    total_steps: int
    log_every: int = 20
    eval_every: int = 0
    image_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        lowest = {"total_steps": 1, "log_every": 1, "keep_checkpoints": 1}
        problems = []
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), lowest.get(field.name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                problems.append(f"{field.name}={value!r} must be an integer of at least {low}")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_config(cls, config: Any) -> "LoopOptions":
        """Takes the fields from a ConfigDict; ValueError lists every bad one."""
        values = checkpoint.config_to_dict(config)
        if "total_steps" not in values:
            raise ValueError("the config has no total_steps; set the number of optimiser steps")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def due(self, every: int, step: int) -> bool:
        """Whether something done each `every` steps, and at the end, is due after `step`."""
        return step == self.total_steps or (every > 0 and step % every == 0)
