"""The generation model's training step: next-scale prediction on the codes of a frozen tokenizer.

One step, on one batch of captions and pictures (or codes made of them before):

1. The frozen tokenizer turns pictures into codes, in float32 at full precision: an argmin decides.
2. The codes of coarser scales become the inputs of each next scale (`generation.model`).
3. Loss = mean cross entropy of the codes and of what follows the image
         + text_weight * mean cross entropy of the caption.
4. Clip, AdamW, moving average.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenflow_jax.generation.model import Generation, TokenLosses, next_scale_features
from tokenflow_jax.parallel.token_losses import token_losses
from tokenflow_jax.tokenizer.frozen import image_codes
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.train.accumulate import accumulate
from tokenflow_jax.train.by_source import means_by_source, sums_by_source
from tokenflow_jax.weights.lora import Adapters

PyTree = Any
Metrics = dict[str, jax.Array]
VOCABULARIES = ("all", "codes")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses that train, and their weights."""

    text_weight: float = 0.0  # of the caption's loss; 0, as the reference, trains on images alone
    log_text: bool = False  # compute the caption's loss for the curves, whatever its weight
    # What the softmax of a code runs over: "all" ids, as in the reference, or "codes", all that
    # sampling chooses from. Then `</img>` and the end are not learned, and leave the sequence.
    vocabulary: str = "all"
    # A code counts side ** -power for the side of its scale; 0, as in the reference: all alike.
    scale_power: float = 0.0

    def __post_init__(self):
        problems = []
        for name in ("text_weight", "scale_power"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} must not be negative")
        if self.vocabulary not in VOCABULARIES:
            problems.append(f"vocabulary {self.vocabulary!r} is not one of {VOCABULARIES}")
        if self.vocabulary == "codes" and self.text:
            problems.append("text_weight and log_text need vocabulary='all'")
        if problems:
            raise ValueError("losses: " + "; ".join(problems))

    @property
    def text(self) -> bool:
        """The caption's loss is computed."""
        return self.text_weight > 0 or self.log_text


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step; `ema`, of what trains, may be None."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Modules and hyper-parameters of a run; `step` is the training step."""

    model: Generation
    losses: LossConfig
    optimizer: optax.GradientTransformation
    pad_id: int  # of padding in prefixes
    suffix: tuple[int, ...]  # ids of `</img>` and the end
    prefix_length: int
    tokenizer: TokenFlow | None = None  # the frozen one, in float32; None when batches hold codes
    precision: str = "highest"  # of its encoders, see `image_codes`
    trainable: PyTree | None = None  # bools shaped like the parameters; None when all train
    adapters: Adapters | None = None  # instead of `trainable`
    ema_decay: float = 0.0  # of the moving average of weights; 0 keeps none
    accumulate: int = 1  # microbatches per step
    loss_tokens: int = 4096  # positions whose logits a device holds at the same time
    sources: tuple[str, ...] = ()  # names of what batches mix; each gets its own curve

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Run one optimization step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: {"tokenizer": params}: its codebooks, and its encoders where batches hold images.
          batch: {"prefix": int32 (B, P)} and "codes" int32 (B, N) or "image" uint8 (B, H, H, 3), of
            the global batch; of a mixture also "source", int32 (B,).

        Returns:
          The new state, and scalar metrics ("loss/...", "accuracy/...", "scale/...").
        """
        prefix_BP, codes_BN = batch["prefix"], self.codes(frozen, batch)
        # Captions differ in length: each label weighs the same, in whatever microbatch it is.
        labels = jnp.maximum(jnp.sum(prefix_BP[:, 1:] != self.pad_id), 1) / self.accumulate
        trained = self.parts.take(state.params)

        def microbatch(carry, rows, key):
            def loss(trained):
                params = self.parts.join(state.params, trained)
                return self.loss(params, frozen, *rows[:2], labels, *rows[2:])

            return carry, jax.grad(loss, has_aux=True)(trained), ()

        rows = (prefix_BP, codes_BN, batch["source"]) if self.sources else (prefix_BP, codes_BN)
        _, sums, _ = accumulate(microbatch, rows, self.accumulate)
        gradients, metrics = jax.tree.map(lambda x: x / self.accumulate, sums)
        metrics |= means_by_source("image", metrics.pop("sources", {}))
        metrics["gradient_norm/all"] = optax.tree.norm(gradients)
        trained, opt_state = optim.update(self.optimizer, gradients, state.opt_state, trained)
        params = self.parts.put(state.params, trained)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if self.ema_decay:
            ema = optax.incremental_update(trained, state.ema, 1 - self.ema_decay)
            state = state.replace(ema=ema)
        return state, metrics

    @property
    def parts(self) -> optim.Whole | Adapters:
        """What the optimizer sees of the parameters."""
        return self.adapters or optim.Whole(self.trainable)

    def codes(self, frozen: PyTree, batch: PyTree) -> jax.Array:
        """Return the codes of a batch: its own, or those of its images."""
        if "codes" in batch:
            return batch["codes"]
        return image_codes(self.tokenizer, frozen["tokenizer"], batch["image"], self.precision)

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        prefix_BP: jax.Array,
        codes_BN: jax.Array,
        text_labels: jax.Array,
        source_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss of a batch, and its metrics; `text_labels` divides the text's loss."""
        losses = self.token_losses(params, frozen, prefix_BP, codes_BN)
        image = total = jnp.mean(losses.image * self._weights(losses.image.shape[1]))
        metrics = {"loss/image": image}
        if source_B is not None:
            each_B = losses.image.mean(axis=1)
            metrics["sources"] = sums_by_source(each_B, source_B, self.sources)
        if losses.text is not None:
            text = losses.text.sum() / text_labels
            total += self.losses.text_weight * text
            # Without a weight it is watched, not learned, so it is no loss of the run.
            metrics["loss/text" if self.losses.text_weight else "watched/text"] = text
        pyramid = self.model.config.pyramid
        metrics["accuracy/codes"] = losses.image_right[:, : pyramid.tokens].mean()
        for side, where in zip(pyramid.sides, pyramid.slices(), strict=True):
            metrics[f"scale/loss_{side}"] = losses.image[:, where].mean()
        return total, metrics | {"loss/total": total}

    def _weights(self, count: int) -> np.ndarray:
        """Return the labels' weights, 1 on average; the suffix counts as the finest scale."""
        sides = np.repeat(self.model.config.scales, np.square(self.model.config.scales))
        sides = np.concatenate([sides, np.full(count - len(sides), sides[-1])])
        weights = sides.astype(np.float32) ** -self.losses.scale_power
        return weights / weights.mean()

    def token_losses(
        self, params: PyTree, frozen: PyTree, prefix_BP: jax.Array, codes_BN: jax.Array
    ) -> TokenLosses:
        """Return the loss of every label."""
        config, options = self.model.config, self.losses
        codebooks = Codebooks.of(frozen["tokenizer"])
        features_BMC = next_scale_features(codes_BN, codebooks, config)
        real_BP = prefix_BP != self.pad_id
        variables = {"params": params}
        if options.vocabulary == "all":
            suffix_BT = jnp.tile(jnp.array(self.suffix, jnp.int32), (prefix_BP.shape[0], 1))
            return self.model.apply(
                variables,
                prefix_BP,
                real_BP,
                codes_BN,
                features_BMC,
                suffix_BT,
                text=options.text,
                tokens=self.loss_tokens,
                method="losses",
            )
        suffix_BT = jnp.zeros((prefix_BP.shape[0], 0), jnp.int32)
        hidden_BLC = self.model.apply(variables, prefix_BP, real_BP, features_BMC, suffix_BT)
        stop = config.image_start + config.codebook_size
        kernel_CV = self.model.apply(variables, method=lambda model: model.lm.head_kernel())
        losses = token_losses(
            hidden_BLC[:, prefix_BP.shape[1] - 1 : -1],
            kernel_CV[:, config.image_start : stop],
            codes_BN,
            self.loss_tokens,
            self.model.dtype,
        )
        return TokenLosses(*losses)

    def init(self, key: jax.Array, params: PyTree | None = None) -> TrainState:
        """Return the state before the first step; `params` replaces the random weights."""
        if params is None:
            model = self.model
            params = self.adapters.init(model, key) if self.adapters else model.init_params(key)
        trained = self.parts.take(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if self.ema_decay else None,
        )
