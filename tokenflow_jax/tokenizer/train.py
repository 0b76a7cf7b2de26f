"""The tokenizer's training step: its losses, and one update of both players.

One step, on one batch of images x:

1. Encode x twice, quantize scale by scale, decode: a reconstruction x', and a reconstruction t' of
   the patch features t that a frozen teacher sees in x.
2. Generator loss = |x - x'|^2 + LPIPS(x, x') + lambda * adversarial(D(x'))      appearance
                 + (1 - cosine(t, t'))                                            meaning
                 + codebook + beta * commitment (+ entropy)                       the code itself
3. Discriminator loss = hinge (or another) on D(x), D(x') for the SAME x', made before the update.
4. Clip, Adam, moving average; usage statistics of the codes.

Both updates are one jitted program. The losses on pixels are differentiated with respect to x'
first, then pulled back through the tokenizer once: the adaptive lambda (a ratio of gradient norms
at the last convolution) then costs two small weight gradients instead of two more backward passes.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tokenflow_jax.nets.lpips import LPIPS
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.tokenizer import losses as adversarial
from tokenflow_jax.tokenizer import quantizer, shares
from tokenflow_jax.tokenizer.codebook import (
    EMACodebook,
    Usage,
    each_usage,
    revive_dead_codes,
    usage_metrics,
)
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.pyramid import (
    distance_statistics,
    draw_kept_scales,
    entropy_loss,
    token_weights,
)
from tokenflow_jax.tokenizer.quantizer import l2_normalize
from tokenflow_jax.tokenizer.state import CodebookConfig, Discriminator, LossConfig, TrainState
from tokenflow_jax.tokenizer.teacher import Teacher
from tokenflow_jax.train import optim
from tokenflow_jax.train.accumulate import accumulate
from tokenflow_jax.train.by_source import means_by_source, sums_by_source

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Modules and hyper-parameters of a run; `step` is the training step."""

    model: TokenFlow
    losses: LossConfig
    codebook: CodebookConfig
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None = None
    teacher: Teacher | None = None  # these three: None leaves their losses out of the program
    discriminator: nn.Module | None = None
    lpips: LPIPS | None = None
    trainable: PyTree | None = None  # bools shaped like the parameters; None when all train
    ema_decay: float = 0.0  # of the moving average of weights; 0 keeps none
    accumulate: int = 1  # microbatches per step
    sources: tuple[str, ...] = ()  # names of what batches mix; each gets its own curve
    seed: int = 0  # of all the randomness in the steps

    def __post_init__(self):
        self.model.config.quantizer.check_codebook(self.codebook)

    def step(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Run one optimization step; to be jitted with `state` donated.

        Args:
          state: the run's state.
          frozen: {"teacher": params, "lpips": params}, as far as the modules are there.
          batch: {"image": uint8 (B, H, H, 3)}, global; of a mixture also "source", int32 (B,).

        Returns:
          The new state, and scalar metrics ("loss/...", "gradient_norm/...", "usage/...", ...).
        """
        config, scales = self.model.config, self.model.config.pyramid
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        keep_key, dropout_key, revive_key = jax.random.split(key, 3)
        keep_S = draw_kept_scales(keep_key, scales, self.losses.scale_drop)
        microbatch = functools.partial(self._gradients, state, frozen, keep_S)
        batch_stats = state.discriminator.batch_stats if state.discriminator else {}
        batch_stats, sums, tokens = accumulate(
            microbatch, batch["image"], self.accumulate, batch_stats, dropout_key
        )
        gradients, metrics = jax.tree.map(lambda x: x / self.accumulate, sums)
        if self.sources:
            sums = sums_by_source(tokens["error"], batch["source"], self.sources)
            metrics |= means_by_source("reconstruction", sums)
        usage = each_usage(
            lambda one, codes_BL: one.update(codes_BL, scales, keep_S),
            state.usage,
            config.indices(tokens["codes"]),
        )
        state, norms = self._apply(state.replace(usage=usage), gradients, batch_stats)
        state = self._move_codebook(state, tokens, keep_S, revive_key)
        return state.replace(step=state.step + 1), metrics | norms | usage_metrics(usage, scales)

    def init(self, key: jax.Array, params: PyTree | None = None) -> TrainState:
        """Return the state before the first step; `params` replaces the random weights."""
        config = self.model.config
        if params is None:
            params = self.model.init_params(key)
        discriminator = None
        if self.discriminator is not None:
            image = jnp.zeros((1, config.image_size, config.image_size, 3))
            variables = self.discriminator.init(jax.random.fold_in(key, 1), image, train=False)
            discriminator = Discriminator(
                params=variables["params"],
                batch_stats=variables.get("batch_stats", {}),
                opt_state=self.discriminator_optimizer.init(variables["params"]),
            )
        moving, window = self.codebook.learning == "ema", self.codebook.usage_window
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
            discriminator=discriminator,
            usage=jax.tree.map(
                lambda size: Usage.empty(window, config.pyramid, size), config.index_sizes
            ),
            codebook=EMACodebook.start(config.codebooks(params)) if moving else None,
        )

    def _gradients(self, state, frozen, keep_S, batch_stats, images_uint8, key):
        """Return batch statistics, (gradients, metrics) of both players, and the tokens."""
        images_BHWC = to_float(images_uint8)
        target_BND = None
        if self.teacher is not None:
            target_BND = self.teacher.features(frozen["teacher"], images_BHWC)
        reconstruct = functools.partial(self._reconstruct, images_BHWC, target_BND, keep_S)
        config, scales = self.model.config, self.model.config.pyramid
        probes = shares.probes(images_BHWC.shape[0], scales, config.code_channels)
        (rec_BHWC, code_loss), pull_back, (metrics, tokens, hidden) = jax.vjp(
            reconstruct, state.params, probes, has_aux=True
        )
        pixel_loss, at_picture, pixel_metrics = self._pixel_losses(
            frozen, images_BHWC, rec_BHWC, key
        )
        pixel_gradient = sum(at_picture.values())
        total, image_gradient = pixel_loss + code_loss, pixel_gradient
        metrics |= pixel_metrics
        discriminator_gradients = None
        if self.discriminator is not None:
            started = state.step >= self.losses.discriminator_start
            weight = jnp.where(started, self.losses.adversarial_weight, 0.0)
            game = adversarial.Game(
                self.discriminator, self.losses.adversarial, self.losses.generator_adversarial
            )
            (loss, batch_stats), gradient = game.fool(
                state.discriminator.params, batch_stats, rec_BHWC
            )
            adaptive = 1.0
            if self.losses.adaptive:
                adaptive = adversarial.adaptive_weight(
                    self.model, state.params, hidden, pixel_gradient, gradient
                )
            total += adaptive * weight * loss
            at_picture["adversarial"] = adaptive * weight * gradient
            image_gradient = pixel_gradient + at_picture["adversarial"]
            discriminator_gradients, batch_stats, discriminator_metrics = game.tell_apart(
                state.discriminator.params, batch_stats, images_BHWC, rec_BHWC, weight
            )
            metrics |= discriminator_metrics | {
                "loss/adversarial": loss,
                "adversarial/weight": weight,
                "adversarial/adaptive": jnp.float32(adaptive),
            }
        if self.sources:
            tokens["error"] = self._error(images_BHWC, rec_BHWC).mean(axis=(1, 2, 3))
        generator_gradients, at_probes = pull_back((image_gradient, jnp.ones_like(code_loss)))
        metrics |= shares.at_picture(at_picture)
        metrics |= shares.at_codes(*at_probes, scales, keep_S, config.semantic_channels)
        gradients = {"generator": generator_gradients, "discriminator": discriminator_gradients}
        return batch_stats, (gradients, metrics | {"loss/total": total}), tokens

    def _reconstruct(self, images_BHWC, target_BND, keep_S, params, probes):
        """Run the tokenizer: ((reconstruction, losses on codes and meaning), the rest)."""
        if self.trainable is not None:
            params = optim.freeze(params, self.trainable)
        config, variables = self.model.config, {"params": params}
        features = self.model.apply(variables, images_BHWC, method="encode")
        pyramid = self.model.apply(variables, features, keep_S, method="quantize")
        at_map_BHWC, at_inputs_BLC = probes
        map_BHWC, z_BLC = pyramid.quantized_BHWC + at_map_BHWC, pyramid.z_BLC + at_inputs_BLC
        decoded = self.model.apply(variables, map_BHWC, method="decode")

        codebooks = config.codebooks(params)
        if self.codebook.learning == "ema":
            codebooks = jax.lax.stop_gradient(codebooks)
        weights_L = token_weights(config.pyramid, keep_S)
        chosen_BLC = codebooks.look_up(pyramid.codes_BL)
        codebook, commitment = quantizer.codebook_losses(z_BLC, chosen_BLC, weights_L)
        commitment *= self.losses.commitment_weight
        entropy = jnp.float32(0)
        if self.losses.entropy_weight:
            halves = config.pyramid, config.pixel_weight, keep_S
            entropy = self.losses.entropy_weight * entropy_loss(z_BLC, codebooks, *halves)
        semantic = jnp.float32(0)
        if target_BND is not None:
            products_BND = l2_normalize(decoded.semantic_BND) * l2_normalize(target_BND)
            semantic = jnp.mean(1 - products_BND.sum(axis=-1))  # 1 - cosine
        semantic *= self.losses.distillation_weight
        metrics = {
            "loss/codebook": codebook,
            "loss/commitment": commitment,
            "loss/entropy": entropy,
            "loss/distillation": semantic,
        } | distance_statistics(pyramid.z_BLC, codebooks, weights_L)
        tokens = {"codes": pyramid.codes_BL}
        if self.codebook.learning == "ema" or self.codebook.revive_every:
            tokens["z"] = jax.lax.stop_gradient(pyramid.z_BLC)
        loss = codebook + commitment + entropy + semantic
        return (decoded.images_BHWC, loss), (metrics, tokens, decoded.last_hidden_BHWC)

    def _error(self, images_BHWC, rec_BHWC):
        error_BHWC = rec_BHWC - images_BHWC
        return jnp.abs(error_BHWC) if self.losses.pixel == "l1" else error_BHWC**2

    def _pixel_losses(self, frozen, images_BHWC, rec_BHWC, key):
        """Return reconstruction and perceptual loss, each one's gradient at rec_BHWC, metrics."""

        def reconstruction(rec_BHWC):
            return jnp.mean(self._error(images_BHWC, rec_BHWC))

        def perceptual(rec_BHWC):
            dropout_key = key if self.losses.perceptual_dropout else None
            variables = {"params": frozen["lpips"]}
            distance_B = self.lpips.apply(variables, images_BHWC, rec_BHWC, dropout_key)
            return self.losses.perceptual_weight * jnp.mean(distance_B)

        values, gradients = {"perceptual": jnp.float32(0)}, {}
        for loss in (reconstruction, perceptual)[: 1 if self.lpips is None else 2]:
            name = loss.__name__
            values[name], gradients[name] = jax.value_and_grad(loss)(rec_BHWC)
        total = values["reconstruction"] + values["perceptual"]
        return total, gradients, {f"loss/{name}": value for name, value in values.items()}

    def _apply(self, state, gradients, batch_stats):
        """Apply both optimizer updates and the moving average."""
        norms = {"gradient_norm/generator": optax.tree.norm(gradients["generator"])}
        params, opt_state = optim.update(
            self.optimizer, gradients["generator"], state.opt_state, state.params
        )
        state = state.replace(params=params, opt_state=opt_state)
        if self.ema_decay:
            ema = optax.incremental_update(params, state.ema, 1 - self.ema_decay)
            state = state.replace(ema=ema)
        if state.discriminator is not None:
            player, gradient = state.discriminator, gradients["discriminator"]
            norms["gradient_norm/discriminator"] = optax.tree.norm(gradient)
            params, opt_state = optim.update(
                self.discriminator_optimizer, gradient, player.opt_state, player.params
            )
            state = state.replace(discriminator=Discriminator(params, batch_stats, opt_state))
        return state, norms

    def _move_codebook(self, state, tokens, keep_S, key):
        """Update the codebooks other than by the gradient; a no-op by default."""
        if "z" not in tokens:
            return state
        config = self.model.config
        codebooks = config.codebooks(state.params)
        z_NC = tokens["z"].reshape(-1, config.code_channels)
        if self.codebook.learning == "ema":
            kept_L = config.pyramid.per_token(keep_S)
            moved, codebooks = state.codebook.update(
                codebooks,
                z_NC,
                tokens["codes"].reshape(-1),
                jnp.tile(kept_L, tokens["codes"].shape[0]),
                self.codebook.ema_decay,
            )
            state = state.replace(codebook=moved)
        if self.codebook.revive_every:
            due = (state.step + 1) % self.codebook.revive_every == 0
            count_K = each_usage(lambda one: one.counts_SK.sum(axis=0), state.usage)
            codebooks = jax.lax.cond(
                due, lambda c: revive_dead_codes(key, c, z_NC, count_K), lambda c: c, codebooks
            )
        return state.replace(params=state.params | codebooks.params())
