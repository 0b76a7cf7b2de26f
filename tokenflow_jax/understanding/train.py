"""How the understanding model learns: next-token prediction of answers about pictures.

One step, on one batch of conversations:

1. The frozen tokenizer turns pictures into codes, in float32 at full precision: an argmin decides.
   Of a small data set that was done before, and a table of features is at hand.
2. Projected features stand where the images are; the language model reads the row.
3. Loss = mean cross entropy of the ids that carry loss, over the whole batch.
4. Clip, AdamW; what does not train has no optimiser state.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.understanding.model import Understanding, visual_features

PyTree = Any
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step.

    Attributes:
      step: int32, steps done.
      params, opt_state: of the understanding model.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree


def image_features(
    tokenizer: TokenFlow, params: PyTree, images_BHWC: jax.Array, strategy: str
) -> jax.Array:
    """What a language model reads of pictures.

    Args:
      tokenizer: in float32.
      params: its encoders and codebooks.
      images_BHWC: uint8.
      strategy: one of `understanding.model.STRATEGIES`.

    Returns:
      float32 (B, N, C), without gradient.
    """
    images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
    variables = {"params": params}
    with jax.default_matmul_precision("highest"):
        features = tokenizer.apply(variables, images_BHWC, method="encode")
        codes_BL = tokenizer.apply(variables, features, method="quantize").codes_BL
    codebooks = Codebooks(params["semantic_codebook"], params["pixel_codebook"])
    found = visual_features(codes_BL, codebooks, tokenizer.config.pyramid, strategy)
    return jax.lax.stop_gradient(found)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Modules and hyper-parameters of a run, as `step` needs them.

    Attributes:
      model: the understanding model.
      tokenizer: the frozen one, in float32.
      optimizer: optax transformation, clipping included.
      trainable: pytree of bools shaped like the parameters, or None when all of them train.
      accumulate: microbatches per step.
      tokens: of which a device holds the logits at the same time.
    """

    model: Understanding
    tokenizer: TokenFlow
    optimizer: optax.GradientTransformation
    trainable: PyTree | None = None
    accumulate: int = 1
    tokens: int = 4096

    def init_params(self, key: jax.Array) -> PyTree:
        """Random weights of the model."""
        ids = jnp.zeros((1, 2), jnp.int32)
        features = jnp.zeros((1, 1, 1, self.model.config.vision_channels))
        return self.model.init(key, ids, ids, ids, ids + 1, features, method="loss")["params"]

    def init(self, key: jax.Array, params: PyTree | None = None) -> TrainState:
        """The state before the first step.

        Args:
          key: of the initial weights.
          params: the model's, when they come from elsewhere.
        """
        params = self.init_params(key) if params is None else params
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def features(self, frozen: PyTree, batch: PyTree) -> jax.Array:
        """The vectors of a batch's images, float32 (B, M, N, C).

        Args:
          frozen: {"features": (images, N, C)}, or {"tokenizer": its parameters}.
          batch: with "image_index" int32 (B, M), or "image" uint8 (B, M, H, H, 3).
        """
        if "image_index" in batch:
            return frozen["features"][batch["image_index"]]
        images = batch["image"]
        flat_BHWC = images.reshape(-1, *images.shape[2:])
        features_BNC = image_features(
            self.tokenizer, frozen["tokenizer"], flat_BHWC, self.model.config.strategy
        )
        return features_BNC.reshape(*images.shape[:2], *features_BNC.shape[1:])

    def loss(self, params: PyTree, frozen: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        """Sums over a batch; see `Understanding.loss`."""
        return self.model.apply(
            {"params": params},
            batch["ids"],
            batch["labels"],
            batch["places"],
            batch["segments"],
            self.features(frozen, batch),
            self.tokens,
            method="loss",
        )

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """One optimisation step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: see `features`.
          batch: of `data.chat.batches`, global.

        Returns:
          The new state, and scalar metrics: "loss/total", "accuracy/answers" (share of labels that
          are the most likely id), "labels" (their number), "filled" (share of the positions that
          are no padding), "gradient_norm/all".
        """
        sums, gradients = self._gradients(state.params, frozen, batch)
        labels = jnp.maximum(sums["labels"], 1.0)
        gradients = jax.tree.map(lambda g: g / labels, gradients)
        metrics = {
            "loss/total": sums["loss"] / labels,
            "accuracy/answers": sums["right"] / labels,
            "labels": sums["labels"],
            "filled": jnp.mean(batch["segments"] > 0, dtype=jnp.float32),
            "gradient_norm/all": optax.tree.norm(gradients),
        }
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def _gradients(self, params: PyTree, frozen: PyTree, batch: PyTree) -> tuple[Metrics, PyTree]:
        """Sums, and the gradient of the summed loss, over all microbatches.

        Labels are unevenly spread: sums, not means, make each of them count the same.
        """

        def microbatch(batch: PyTree) -> tuple[Metrics, PyTree]:
            def loss(params):
                if self.trainable is not None:
                    params = optim.freeze(params, self.trainable)
                sums = self.loss(params, frozen, batch)
                return sums["loss"], sums

            gradients, sums = jax.grad(loss, has_aux=True)(params)
            return sums, gradients

        count = self.accumulate
        if count == 1:
            return microbatch(batch)
        rows = batch["ids"].shape[0]
        if rows % count:
            raise ValueError(f"batch of {rows} conversations does not split by {count}")
        # Microbatch m takes every count-th row, so that each device keeps the rows it holds.
        batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes = jax.eval_shape(microbatch, jax.tree.map(lambda x: x[0], batches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(sums, batch):
            return jax.tree.map(jnp.add, sums, microbatch(batch)), None

        return jax.lax.scan(body, zeros, batches)[0]
