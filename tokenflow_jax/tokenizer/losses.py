"""Adversarial losses on logits: plain functions, means over all patches in float32.

For every pair, `real` and `fake` are the discriminator's logits, of any shape, high for real.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def hinge_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Discriminator: half the means of max(0, 1 - real) and max(0, 1 + fake)."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Discriminator: half the binary cross entropies of real as 1 and fake as 0."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def non_saturating_reference_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Discriminator: the original's non-saturating loss, with the arguments in the wrong order.

    The logits become the targets of the cross entropy. The fake half is log 2 whatever `fake` is,
    and the real half is linear in `real`. For parity only; `vanilla_d` is what was meant.
    """
    del fake
    return 0.5 * (non_saturating_reference_g(real) + math.log(2.0))


def hinge_g(fake: jax.Array) -> jax.Array:
    """Generator: minus the mean logit, which goes with `hinge_d`."""
    return -fake.mean()


def non_saturating_g(fake: jax.Array) -> jax.Array:
    """Generator: the binary cross entropy of fake as 1."""
    return jax.nn.softplus(-fake).mean()


def non_saturating_reference_g(fake: jax.Array) -> jax.Array:
    """Generator: the original's non-saturating loss, see `non_saturating_reference_d`."""
    return 1.0 + math.log1p(math.exp(-1.0)) - fake.mean()


# The non-saturating game differs from the vanilla one on the generator's side only, where
# "vanilla" is taken as the same cross entropy (the saturating form of 2014 is of no use).
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


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Loss of the discriminator.

    Args:
      kind: a key of `DISCRIMINATOR_LOSSES`.
      real, fake: logits of real and of reconstructed images, any shape.

    Returns:
      Scalar float32.

    Raises:
      ValueError: an unknown kind.
    """
    _check(kind, DISCRIMINATOR_LOSSES)
    return DISCRIMINATOR_LOSSES[kind](real.astype(jnp.float32), fake.astype(jnp.float32))


def generator_loss(kind: str, fake: jax.Array) -> jax.Array:
    """Adversarial loss of the generator.

    Args:
      kind: a key of `GENERATOR_LOSSES`.
      fake: logits of reconstructed images, any shape.

    Returns:
      Scalar float32.

    Raises:
      ValueError: an unknown kind.
    """
    _check(kind, GENERATOR_LOSSES)
    return GENERATOR_LOSSES[kind](fake.astype(jnp.float32))


def _check(kind: str, known: dict[str, Callable]) -> None:
    if kind not in known:
        raise ValueError(f"adversarial loss {kind!r}: choose one of {sorted(known)}")
