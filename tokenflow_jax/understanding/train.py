"""The understanding model's training step: next-token prediction of answers about pictures.

One step, on one batch of conversations:

1. The frozen tokenizer turns pictures into codes, in float32 at full precision: an argmin decides.
   For a small data set this was done before, and the features come from a table.
2. Projected features stand where the images are; the language model reads the row.
3. Loss = mean cross entropy of the ids that carry loss, over the whole batch.
4. Clip, AdamW; parameters that do not train have no optimizer state.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tokenflow_jax.tokenizer.frozen import image_codes
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.train.accumulate import accumulate
from tokenflow_jax.train.by_source import means_by_source
from tokenflow_jax.understanding.model import Understanding, visual_features
from tokenflow_jax.weights.lora import Adapters

PyTree = Any
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Modules and hyper-parameters of a run; `step` is the training step."""

    model: Understanding
    tokenizer: TokenFlow  # the frozen one, in float32
    optimizer: optax.GradientTransformation
    precision: str = "highest"  # of the tokenizer's encoders, see `image_codes`
    trainable: PyTree | None = None  # bools shaped like the parameters; None when all train
    adapters: Adapters | None = None  # instead of `trainable`
    accumulate: int = 1  # microbatches per step
    loss_tokens: int = 4096  # positions whose logits a device holds at the same time
    sources: tuple[str, ...] = ()  # names of what batches mix; each gets its own curve

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Run one optimization step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: see `features`.
          batch: from `data.chat.batches`, global.

        Returns:
          The new state, and scalar metrics; "filled" is the share of positions without padding.
        """
        trained = self.parts.take(state.params)

        def microbatch(carry, rows, key):
            def loss(trained):
                sums = self.loss(self.parts.join(state.params, trained), frozen, rows)
                return sums["loss"], sums

            return carry, jax.grad(loss, has_aux=True)(trained), ()

        # Labels are unevenly spread over microbatches: sums, not means, weight all of them alike.
        _, (gradients, sums), _ = accumulate(microbatch, batch, self.accumulate)
        labels = jnp.maximum(sums["labels"], 1.0)
        gradients = jax.tree.map(lambda g: g / labels, gradients)
        metrics = {
            "loss/total": sums["loss"] / labels,
            "accuracy/answers": sums["right"] / labels,
            "labels": sums["labels"],
            "filled": jnp.mean(batch["segments"] > 0, dtype=jnp.float32),
            "gradient_norm/all": optax.tree.norm(gradients),
            **means_by_source("loss", sums.get("sources", {})),
        }
        trained, opt_state = optim.update(self.optimizer, gradients, state.opt_state, trained)
        params = self.parts.put(state.params, trained)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    @property
    def parts(self) -> optim.Whole | Adapters:
        """What the optimizer sees of the parameters."""
        return self.adapters or optim.Whole(self.trainable)

    def features(self, frozen: PyTree, batch: PyTree) -> jax.Array:
        """Return the vectors of a batch's images, float32 (B, M, N, C).

        Args:
          frozen: {"features": (images, N, C)}, or {"tokenizer": its parameters}.
          batch: with "image_index" int32 (B, M), or "image" uint8 (B, M, H, H, 3).
        """
        if "image_index" in batch:
            return frozen["features"][batch["image_index"]]
        images_BMHWC = batch["image"]
        flat_BHWC = images_BMHWC.reshape(-1, *images_BMHWC.shape[2:])
        features_BNC = self.image_features(frozen["tokenizer"], flat_BHWC)
        return features_BNC.reshape(*images_BMHWC.shape[:2], *features_BNC.shape[1:])

    def image_features(self, params: PyTree, images_BHWC: jax.Array) -> jax.Array:
        """Return what the language model reads of uint8 images: float32 (B, N, C)."""
        codes_BL = image_codes(self.tokenizer, params, images_BHWC, self.precision)
        scales, strategy = self.tokenizer.config.pyramid, self.model.config.strategy
        features_BNC = visual_features(codes_BL, Codebooks.of(params), scales, strategy)
        return jax.lax.stop_gradient(features_BNC)

    def loss(self, params: PyTree, frozen: PyTree, batch: PyTree) -> Metrics:
        """Return sums over a batch; see `Understanding.loss`."""
        return self.model.apply(
            {"params": params},
            batch["ids"],
            batch["labels"],
            batch["places"],
            batch["segments"],
            self.features(frozen, batch),
            self.loss_tokens,
            batch.get("source"),
            self.sources,
            method="loss",
        )

    def init(self, key: jax.Array, params: PyTree | None = None) -> TrainState:
        """Return the state before the first step; `params` replaces the random weights."""
        if params is None:
            model = self.model
            params = self.adapters.init(model, key) if self.adapters else model.init_params(key)
        opt_state = self.optimizer.init(self.parts.take(params))
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)
