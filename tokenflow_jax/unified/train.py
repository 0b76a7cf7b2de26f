"""The unified model's training step: answers about pictures, and pictures, in the same rows.

One step, on one batch of conversations:

1. The frozen tokenizer turns pictures into codes, in float32 at full precision: an argmin decides.
   For a small data set this was done before, and the codes come from a table.
2. The codes become what is read, the last scale's map, and what is written, next-scale inputs.
3. Loss = text_weight * mean cross entropy of the text that carries loss
        + code_weight * weighted mean cross entropy of the codes, each mean over the whole batch.
4. Clip, AdamW or Muon; parameters that do not train have no optimizer state.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenflow_jax.generation.model import next_scale_features
from tokenflow_jax.tokenizer.frozen import image_codes
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.train.accumulate import accumulate
from tokenflow_jax.train.by_source import means_by_source, sums_by_source
from tokenflow_jax.understanding import train as understanding
from tokenflow_jax.understanding.model import visual_features
from tokenflow_jax.understanding.train import TrainState
from tokenflow_jax.unified.model import VOCABULARIES, Features, Unified

PyTree = Any
Metrics = dict[str, jax.Array]
KINDS = ("answer", "draw", "both")  # conversations that read a picture, write one, or both


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses that train, and their weights."""

    text_weight: float = 1.0
    code_weight: float = 1.0
    vocabulary: str = "own"  # what the softmax of a token runs over, one of `model.VOCABULARIES`
    # A code counts side ** -power for the side of its scale.
    scale_power: float = 0.0
    learn_text_head: bool = True  # False keeps the head's columns of text as they are

    def __post_init__(self):
        problems = []
        for name in ("text_weight", "code_weight", "scale_power"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} must not be negative")
        if self.vocabulary not in VOCABULARIES:
            problems.append(f"vocabulary {self.vocabulary!r} is not one of {VOCABULARIES}")
        if problems:
            raise ValueError("losses: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Trainer(understanding.Trainer):
    """Modules and hyper-parameters of a run; `step` is the training step."""

    model: Unified
    losses: LossConfig = LossConfig()

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Run one optimization step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: {"tokenizer": params}, its codebooks and, where batches hold images, its encoders;
            or also {"codes": int32 (images, N)}, where batches hold "image_index".
          batch: from `data.chat.batches`, global.

        Returns:
          The new state, and scalar metrics, see `metrics`.
        """
        trained = self.parts.take(state.params)
        # Labels are unevenly spread over microbatches: those of the whole batch divide.
        counts = {
            "text": (batch["labels"] >= 0).sum(),
            "codes": (batch["places"] <= -2).sum(),
        }
        weights = {"text": self.losses.text_weight, "codes": self.losses.code_weight}

        def microbatch(carry, rows, key):
            def loss(trained):
                sums = self.loss(self.parts.join(state.params, trained), frozen, rows)
                parts = {
                    n: weights[n] * sums[n]["loss"] / jnp.maximum(counts[n], 1) for n in weights
                }
                return sum(parts.values()), sums

            return carry, jax.grad(loss, has_aux=True)(trained), ()

        _, (gradients, sums), _ = accumulate(microbatch, batch, self.accumulate)
        metrics = self.metrics(sums)
        metrics["filled"] = jnp.mean(batch["segments"] > 0, dtype=jnp.float32)
        metrics["gradient_norm/all"] = optax.tree.norm(gradients)
        trained, opt_state = optim.update(self.optimizer, gradients, state.opt_state, trained)
        params = self.parts.put(state.params, trained)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def metrics(self, sums: PyTree) -> Metrics:
        """Return "loss/...", "accuracy/...", "scale/loss_SIDE", "kind/...", "source/..." of sums.

        Accuracies and kinds that a batch has none of are NaN, which averages leave out.
        """
        losses = {n: sums[n]["loss"] / jnp.maximum(sums[n]["labels"], 1) for n in ("text", "codes")}
        total = self.losses.text_weight * losses["text"] + self.losses.code_weight * losses["codes"]
        found = {
            "loss/total": total,
            "loss/text": losses["text"],
            "loss/codes": losses["codes"],
            "accuracy/answers": sums["text"]["right"] / sums["text"]["labels"],
            "accuracy/codes": sums["codes"]["right"] / sums["codes"]["labels"],
            "labels": sums["text"]["labels"] + sums["codes"]["labels"],
        }
        for group in ("scale", "kind"):
            found |= {f"{group}/{name}": x / count for name, (x, count) in sums[group].items()}
        return found | means_by_source("loss", sums.get("sources", {}))

    def codes(self, frozen: PyTree, batch: PyTree) -> jax.Array:
        """Return the codes (B, M, N) of a batch's images."""
        if "image_index" in batch:
            return frozen["codes"][batch["image_index"]]
        images_BMHWC = batch["image"]
        codes_IN = self.image_codes(
            frozen["tokenizer"], images_BMHWC.reshape(-1, *images_BMHWC.shape[2:])
        )
        return codes_IN.reshape(*images_BMHWC.shape[:2], -1)

    def image_codes(self, params: PyTree, images_BHWC: jax.Array) -> jax.Array:
        """Return the codes (B, N) of uint8 images."""
        return image_codes(self.tokenizer, params, images_BHWC, self.precision)

    def code_features(self, codebooks: Codebooks, codes_BMN: jax.Array) -> Features:
        """Return what the model takes of pictures, to read and to write them; see `Unified`."""
        config, flat_IN = self.model.config, codes_BMN.reshape(-1, codes_BMN.shape[-1])
        features = {
            "read": visual_features(flat_IN, codebooks, config.pyramid, config.strategy),
            "write": next_scale_features(flat_IN, codebooks, config),
        }
        return {name: x.reshape(*codes_BMN.shape[:2], *x.shape[1:]) for name, x in features.items()}

    def loss(self, params: PyTree, frozen: PyTree, batch: PyTree) -> PyTree:
        """Return sums over a batch, from which `metrics` come.

        "text" and "codes" have "loss" (weighted), "labels" and "right"; "scale", "kind" and, of a
        mixture, "sources" each part's loss and labels.
        """
        options, config = self.losses, self.model.config
        codes_BMN = self.codes(frozen, batch)
        codebooks = Codebooks.of(frozen["tokenizer"])
        losses_BL, right_BL, labels_BL = self.model.apply(
            {"params": params},
            *(batch[name] for name in ("ids", "labels", "places", "segments")),
            jax.lax.stop_gradient(self.code_features(codebooks, codes_BMN)),
            codes_BMN,
            self.loss_tokens,
            options.vocabulary,
            0 if options.learn_text_head else config.image_start,
            method="losses",
        )
        real_BL = (labels_BL >= 0).astype(jnp.float32)
        # What each position predicts: the place of the next one.
        next_BL = jnp.pad(batch["places"][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        code_BL = next_BL <= -2
        number_BL = (-2 - next_BL) % config.pyramid.tokens
        scale_N = np.repeat(np.arange(len(config.scales)), np.square(config.scales))
        scale_BL = jnp.where(code_BL, jnp.asarray(scale_N)[number_BL], -1)
        weights_BL = jnp.where(code_BL, jnp.asarray(self._weights())[number_BL], 1.0)

        def part(chosen_BL: jax.Array) -> dict[str, jax.Array]:
            own_BL = real_BL * chosen_BL
            summed = {"loss": losses_BL * weights_BL, "labels": 1.0, "right": right_BL}
            return {name: jnp.sum(x * own_BL) for name, x in summed.items()}

        scales = tuple(f"loss_{side}" for side in config.scales)
        kinds_BM = _kinds(batch["places"], batch["segments"], codes_BMN.shape[1])
        sums = {
            "text": part(~code_BL),
            "codes": part(code_BL),
            "scale": sums_by_source(losses_BL, scale_BL, scales, real_BL),
            "kind": sums_by_source(losses_BL, _own(kinds_BM, batch["segments"]), KINDS, real_BL),
        }
        if "source" in batch:
            own_BL = _own(batch["source"], batch["segments"])
            sums["sources"] = sums_by_source(losses_BL, own_BL, self.sources, real_BL)
        return sums

    def _weights(self) -> np.ndarray:
        """Return the codes' weights (N,), 1 on average."""
        sides = np.repeat(self.model.config.scales, np.square(self.model.config.scales))
        weights = sides.astype(np.float32) ** -self.losses.scale_power
        return weights / weights.mean()


def _own(of_segments_BM: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """Return each token's entry among those of its row's conversations."""
    return jnp.take_along_axis(of_segments_BM, jnp.maximum(segments_BL - 1, 0), axis=1)


def _kinds(places_BL: jax.Array, segments_BL: jax.Array, conversations: int) -> jax.Array:
    """Return the place in KINDS of each conversation of each row, -1 without a picture."""
    own_BML = segments_BL[:, None] == jnp.arange(1, conversations + 1)[:, None]
    reads_BM, writes_BM = (
        (own_BML & kind_BL[:, None]).any(-1).astype(jnp.int32)
        for kind_BL in (places_BL >= 0, places_BL <= -2)
    )
    return reads_BM + 2 * writes_BM - 1
