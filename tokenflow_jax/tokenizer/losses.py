"""Adversarial losses: means over all patches of the discriminator's logits, high for real."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


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
