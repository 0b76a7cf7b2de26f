"""How the generation model learns: next-scale prediction on the codes of a frozen tokenizer.

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
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim

PyTree = Any
Metrics = dict[str, jax.Array]
VOCABULARIES = ("all", "codes")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is learnt, and how it is computed.

    Attributes:
      text_weight: of the caption's loss; 0 learns images alone, as the reference is trained.
      log_text: computes the caption's loss for the curves, whatever its weight.
      vocabulary: over what the softmax of a code runs: "all" ids, as in the reference, or "codes",
        which is all that sampling chooses from. Then `</img>` and the end are not learnt either,
        and leave the sequence.
      scale_power: a code of a scale counts side ** -power, so that 1 lets all sides count in
        proportion to their length; 0 lets all codes count alike, as in the reference.
      tokens: positions whose logits a device holds at the same time.
    """

    text_weight: float = 0.0
    log_text: bool = False
    vocabulary: str = "all"
    scale_power: float = 0.0
    tokens: int = 4096

    def __post_init__(self):
        problems = []
        for name in ("text_weight", "scale_power"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} must not be negative")
        if self.vocabulary not in VOCABULARIES:
            problems.append(f"vocabulary {self.vocabulary!r} is not one of {VOCABULARIES}")
        if self.vocabulary == "codes" and self.text:
            problems.append("text_weight and log_text need vocabulary='all'")
        if self.tokens < 1:
            problems.append(f"tokens {self.tokens} must be at least 1")
        if problems:
            raise ValueError("losses: " + "; ".join(problems))

    @property
    def text(self) -> bool:
        """Whether the caption's loss is computed."""
        return self.text_weight > 0 or self.log_text


class TrainState(flax.struct.PyTreeNode):
    """Everything a run carries from step to step.

    Attributes:
      step: int32, steps done.
      params, opt_state: of the generation model.
      ema: moving average of params, or None.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Modules and hyper-parameters of a run, as `step` needs them.

    Attributes:
      model: the generation model.
      losses: see there.
      optimizer: optax transformation, clipping included.
      pad_id: of padding in prefixes.
      suffix: ids of `</img>` and the end.
      prefix_length: ids of a prefix.
      tokenizer: the frozen one, in float32; encodes batches of images. None for batches of codes.
      trainable: pytree of bools shaped like the parameters, or None when all of them train.
      ema_decay: of the moving average of weights; 0 keeps none.
      accumulate: microbatches per step.
    """

    model: Generation
    losses: LossConfig
    optimizer: optax.GradientTransformation
    pad_id: int
    suffix: tuple[int, ...]
    prefix_length: int
    tokenizer: TokenFlow | None = None
    trainable: PyTree | None = None
    ema_decay: float = 0.0
    accumulate: int = 1

    def init_params(self, key: jax.Array) -> PyTree:
        """Random weights of the model."""
        config = self.model.config
        count = config.pyramid.tokens
        prefix_BP = jnp.zeros((1, 2), jnp.int32)
        variables = self.model.init(
            key,
            prefix_BP,
            prefix_BP == 0,
            jnp.zeros((1, count), jnp.int32),
            jnp.zeros((1, count - 1, config.code_channels)),
            prefix_BP,
            method="losses",
        )
        return variables["params"]

    def init(self, key: jax.Array, params: PyTree | None = None) -> TrainState:
        """The state before the first step.

        Args:
          key: of the initial weights.
          params: the model's, when they come from elsewhere.
        """
        params = self.init_params(key) if params is None else params
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
        )

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """One optimisation step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: {"tokenizer": params}: its codebooks, and its encoders where batches hold images.
          batch: {"prefix": int32 (B, P)} and "codes" int32 (B, N) or "image" uint8 (B, H, H, 3), of
            the global batch.

        Returns:
          The new state, and scalar metrics ("loss/...", "accuracy/...", "scale/...").
        """
        codes_BN = self.codes(frozen, batch)
        gradients, metrics = self._gradients(state, frozen, batch["prefix"], codes_BN)
        norms = {"gradient_norm/all": optax.tree.norm(gradients)}
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if self.ema_decay:
            state = state.replace(ema=optim.ema_update(state.ema, params, self.ema_decay))
        return state, metrics | norms

    def codes(self, frozen: PyTree, batch: PyTree) -> jax.Array:
        """The codes of a batch: its own, or those of its images."""
        if "codes" in batch:
            return batch["codes"]
        images_BHWC = batch["image"].astype(jnp.float32) / 127.5 - 1
        variables = {"params": frozen["tokenizer"]}
        with jax.default_matmul_precision("highest"):
            features = self.tokenizer.apply(variables, images_BHWC, method="encode")
            codes_BN = self.tokenizer.apply(variables, features, method="quantize").codes_BL
        return jax.lax.stop_gradient(codes_BN)

    def _gradients(self, state, frozen, prefix_BP, codes_BN):
        """Gradients and metrics of a batch, averaged over its microbatches."""
        count = self.accumulate
        # Captions differ in length: each label weighs the same, in whatever microbatch it is.
        labels = jnp.maximum(jnp.sum(prefix_BP[:, 1:] != self.pad_id), 1) / count

        def microbatch(inputs):
            prefix_BP, codes_BN = inputs

            def loss(params):
                if self.trainable is not None:
                    params = optim.freeze(params, self.trainable)
                return self.loss(params, frozen, prefix_BP, codes_BN, labels)

            return jax.grad(loss, has_aux=True)(state.params)

        if count == 1:
            return microbatch((prefix_BP, codes_BN))
        if prefix_BP.shape[0] % count:
            raise ValueError(f"batch of {prefix_BP.shape[0]} images does not split by {count}")
        # Microbatch m takes every count-th row, so that each device keeps the rows it holds.
        inputs = jax.tree.map(
            lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), (prefix_BP, codes_BN)
        )
        shapes = jax.eval_shape(microbatch, jax.tree.map(lambda x: x[0], inputs))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(sums, inputs):
            return jax.tree.map(jnp.add, sums, microbatch(inputs)), None

        sums, _ = jax.lax.scan(body, zeros, inputs)
        return jax.tree.map(lambda x: x / count, sums)

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        prefix_BP: jax.Array,
        codes_BN: jax.Array,
        text_labels: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch, and its metrics.

        Args:
          params: of the model.
          frozen: see `step`.
          prefix_BP, codes_BN: ids and codes.
          text_labels: by how many labels the caption's loss is divided; its own when None.
        """
        losses = self.token_losses(params, frozen, prefix_BP, codes_BN)
        image = total = jnp.mean(losses.image * self._weights(losses.image.shape[1]))
        metrics = {"loss/image": image}
        if losses.text is not None:
            text = losses.text_loss()
            if text_labels is not None:
                text = losses.text.sum() / text_labels
            total += self.losses.text_weight * text
            # What has no weight is watched, not learnt, so it is no loss of the run.
            metrics["loss/text" if self.losses.text_weight else "watched/text"] = text
        pyramid = self.model.config.pyramid
        metrics["accuracy/codes"] = losses.image_right[:, : pyramid.tokens].mean()
        for side, where in zip(pyramid.sides, pyramid.slices(), strict=True):
            metrics[f"scale/loss_{side}"] = losses.image[:, where].mean()
        return total, metrics | {"loss/total": total}

    def _weights(self, count: int) -> np.ndarray:
        """What each of an image's labels counts, 1 on average; the suffix counts as the finest."""
        sides = np.repeat(self.model.config.scales, np.square(self.model.config.scales))
        sides = np.concatenate([sides, np.full(count - len(sides), sides[-1])])
        weights = sides.astype(np.float32) ** -self.losses.scale_power
        return weights / weights.mean()

    def token_losses(
        self, params: PyTree, frozen: PyTree, prefix_BP: jax.Array, codes_BN: jax.Array
    ) -> TokenLosses:
        """The loss of every label; see `loss`."""
        config, options = self.model.config, self.losses
        codebooks = Codebooks(
            frozen["tokenizer"]["semantic_codebook"], frozen["tokenizer"]["pixel_codebook"]
        )
        features_BMC = next_scale_features(codes_BN, codebooks, config.pyramid)
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
                tokens=options.tokens,
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
            options.tokens,
            self.model.dtype,
        )
        return TokenLosses(*losses)
