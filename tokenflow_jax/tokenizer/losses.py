"""Adversarial losses: means over all patches of the discriminator's logits, high for real."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.tokenizer.model import TokenFlow


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Return the float32 loss of `kind`, a key of `DISCRIMINATOR_LOSSES`; logits of any shape."""
    _check(kind, DISCRIMINATOR_LOSSES)
    return DISCRIMINATOR_LOSSES[kind](real.astype(jnp.float32), fake.astype(jnp.float32))


def generator_loss(kind: str, fake: jax.Array) -> jax.Array:
    """Return the float32 loss of `kind`, a key of `GENERATOR_LOSSES`; logits of any shape."""
    _check(kind, GENERATOR_LOSSES)
    return GENERATOR_LOSSES[kind](fake.astype(jnp.float32))


def _check(kind: str, known: dict[str, Callable]) -> None:
    if kind not in known:
        raise ValueError(f"adversarial loss {kind!r}: choose one of {sorted(known)}")


def hinge_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Half the means of max(0, 1 - real) and max(0, 1 + fake)."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Half the binary cross entropies of real as 1 and fake as 0."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def non_saturating_reference_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The original's non-saturating loss, whose arguments are in the wrong order; for parity only.

    The logits become the targets of the cross entropy: the fake half is log 2 whatever `fake` is,
    and the real half is linear in `real`. `vanilla_d` is what was meant.
    """
    del fake
    return 0.5 * (non_saturating_reference_g(real) + math.log(2.0))


def hinge_g(fake: jax.Array) -> jax.Array:
    """Minus the mean logit."""
    return -fake.mean()


def non_saturating_g(fake: jax.Array) -> jax.Array:
    """Binary cross entropy of fake as 1."""
    return jax.nn.softplus(-fake).mean()


def non_saturating_reference_g(fake: jax.Array) -> jax.Array:
    """The original's non-saturating loss; see `non_saturating_reference_d`."""
    return 1.0 + math.log1p(math.exp(-1.0)) - fake.mean()


# "vanilla" and "non_saturating" are the same game: the generator's saturating form of 2014, the
# only difference between them, is of no use.
DISCRIMINATOR_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "hinge": hinge_d,
    "vanilla": vanilla_d,
    "non_saturating": vanilla_d,
    "non_saturating_reference": non_saturating_reference_d,
}
GENERATOR_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "hinge": hinge_g,
    "vanilla": non_saturating_g,
    "non_saturating": non_saturating_g,
    "non_saturating_reference": non_saturating_reference_g,
}


@dataclasses.dataclass(frozen=True)
class Game:
    """Both players' losses, and their gradients."""

    discriminator: nn.Module
    kind: str = "hinge"  # a key of `DISCRIMINATOR_LOSSES`
    generator_kind: str = "hinge"  # a key of `GENERATOR_LOSSES`

    def judge(self, params: Any, batch_stats: Any, images_BHWC: jax.Array) -> tuple[jax.Array, Any]:
        """Return the discriminator's logits, and its moved BatchNorm statistics."""
        logits, updated = self.discriminator.apply(
            {"params": params, "batch_stats": batch_stats},
            images_BHWC,
            train=True,
            mutable=["batch_stats"],
        )
        return logits.astype(jnp.float32), updated.get("batch_stats", {})

    def fool(self, params: Any, batch_stats: Any, rec_BHWC: jax.Array) -> tuple[Any, jax.Array]:
        """Return the generator's loss: ((loss, batch_stats), gradient at rec_BHWC)."""

        def loss(rec_BHWC):
            logits, moved = self.judge(params, batch_stats, rec_BHWC)
            return generator_loss(self.generator_kind, logits), moved

        return jax.value_and_grad(loss, has_aux=True)(rec_BHWC)

    def tell_apart(
        self,
        params: Any,
        batch_stats: Any,
        images_BHWC: jax.Array,
        rec_BHWC: jax.Array,
        weight: jax.Array,
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Return the gradients of `weight` times the discriminator's loss, statistics, metrics."""
        rec_BHWC = jax.lax.stop_gradient(rec_BHWC)

        def loss(params):
            # Two passes, as BatchNorm must not mix real and reconstructed images.
            real, moved = self.judge(params, batch_stats, images_BHWC)
            fake, moved = self.judge(params, moved, rec_BHWC)
            metrics = {
                "adversarial/logits_real": real.mean(),
                "adversarial/logits_fake": fake.mean(),
            }
            value = discriminator_loss(self.kind, real, fake)
            return weight * value, (moved, metrics)

        (value, (moved, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, moved, metrics | {"loss/discriminator": value}


def adaptive_weight(
    model: TokenFlow,
    params: Any,
    hidden_BHWC: jax.Array,  # the input of the pixel decoder's last convolution
    pixel_gradient: jax.Array,  # both at the reconstruction
    adversarial_gradient: jax.Array,
) -> jax.Array:
    """Return |d pixel loss| / |d adversarial loss| at the last kernel (VQGAN, eq. 7)."""
    last = params["pixel_decoder"]["conv_out"]
    convolution = nn.Conv(3, (3, 3), padding=1, dtype=model.dtype)

    def apply(kernel):
        output = convolution.apply({"params": last | {"kernel": kernel}}, hidden_BHWC)
        return model.to_image_size(output)

    _, pull_back = jax.vjp(apply, last["kernel"])
    pixel_norm, adversarial_norm = (
        jnp.linalg.norm(pull_back(gradient)[0].ravel())
        for gradient in (pixel_gradient, adversarial_gradient)
    )
    return jnp.clip(pixel_norm / (adversarial_norm + 1e-4), 0.0, 1e4)
