"""Draws images with the generation model, scale by scale: one compiled program for the whole loop.

With the cache, the prefix is computed once and each scale is one forward pass of its own tokens:

    prefix   P tokens -> code of the first scale
    scale 2  4 tokens -> its codes       (reads the cache, and writes its keys and values into it)
    ...

Further passes over a scale ("refinement") take the scale's own codes into its input and draw all of
them again. Later scales read what the FIRST pass put into the cache, because in the reference, that
recomputes everything, a scale's input is the regular one again when later scales are computed.

`sample` is what to call: `jax.jit(functools.partial(sample, model, passes=PASSES[1]))` compiles
once for each number of images and length of the prefix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenflow_jax.generation.model import Generation
from tokenflow_jax.nets import sampling
from tokenflow_jax.nets.attention import Mask
from tokenflow_jax.nets.lm import Cache, init_cache
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.tokenizer.quantizer import Codebooks

# (top_k, top_p) of each pass over a scale: the reference's settings for one, two and three passes.
PASSES: dict[int, tuple[tuple[int, float], ...]] = {
    1: ((600, 0.6),),
    2: ((1200, 0.8), (1, 0.0)),
    3: ((1200, 0.8), (100, 0.8), (1, 0.0)),
}
GUIDANCE = 7.5
METHODS = ("cache", "so_far", "whole")


class Draw(NamedTuple):
    """What one pass over a scale did, for tests and studies.

    Attributes:
      scale, index: which scale and which pass over it, both from 0.
      codes_BL: drawn.
      logits_BLn: guided, before the filter, of the codes that were asked for.
    """

    scale: int
    index: int
    codes_BL: jax.Array
    logits_BLn: jax.Array


class Prompt(NamedTuple):
    """Prefixes of one length: text, padded on the left, and `<img>`.

    Attributes:
      ids_BP: int.
      real_BP: bool, False for padding.
    """

    ids_BP: jax.Array
    real_BP: jax.Array


def sample(
    model: Generation,
    params: Any,
    codebooks: Codebooks,
    prompt: Prompt,
    negative: Prompt | None,
    keys_B: jax.Array,
    guidance: jax.Array | float = GUIDANCE,
    *,
    passes: tuple[tuple[int, float], ...] = PASSES[1],
    method: str = "cache",
) -> jax.Array:
    """Draws the codes of B images.

    Args:
      model: the generation model.
      params: its variables, {"params": ...}.
      codebooks: the tokenizer's.
      prompt: what to draw, B rows.
      negative: what the guidance leads away from, B rows or one for all of the prompt's length;
        None draws without guidance, in half the time.
      keys_B: one random key per image; what a row draws depends on its own key and prompt only.
      guidance: strength g >= 0. With t = g i / (K - 1) for scale i of K, the logits are
        (1 + t) conditional - t unconditional: none at the first scale, g at the last.
      passes: (top_k, top_p) of each pass; the first scale, which has no input of its own, has one.
        See `sampling.keep_likely`.
      method: one of METHODS: keep keys and values in a "cache"; or, for comparison, compute the
        prefix and all scales "so_far" anew in every pass, or the "whole" sequence with zeros for
        the scales to come, as the reference does. The codes are the same.

    Returns:
      int32 (B, N), coarse to fine. The first codes, up to the end of a scale, are a preview:
      `multiscale.features_from_codes` takes them.
    """
    codes_BN, _ = sample_traced(
        model, params, codebooks, prompt, negative, keys_B, guidance, passes=passes, method=method
    )
    return codes_BN


def sampling_function(
    model: Generation, pad_id: int, passes: tuple[tuple[int, float], ...], guided: bool
) -> Callable[..., jax.Array]:
    """The whole sampling loop, to be compiled.

    Returns:
      A function of parameters, codebooks, ids (B, P) of prompts and (1, P) of the negative prompt,
      a key per image and the strength of guidance, to codes (B, N).
    """

    def run(params, codebooks, ids_BP, negative_1P, keys_B, guidance):
        def prompt(ids):
            return Prompt(ids, ids != pad_id)

        negative = prompt(negative_1P) if guided else None
        return sample(
            model, {"params": params}, codebooks, prompt(ids_BP), negative, keys_B, guidance,
            passes=passes,
        )  # fmt: skip

    return run


def sample_traced(
    model: Generation,
    params: Any,
    codebooks: Codebooks,
    prompt: Prompt,
    negative: Prompt | None,
    keys_B: jax.Array,
    guidance: jax.Array | float = GUIDANCE,
    *,
    passes: tuple[tuple[int, float], ...] = PASSES[1],
    method: str = "cache",
    watched: jax.Array | None = None,
) -> tuple[jax.Array, list[Draw]]:
    """As `sample`, and says what every pass did.

    Args:
      watched: int (n,), codes whose guided logits are returned; None takes none.

    Returns:
      The codes, and a `Draw` for every pass over every scale.

    Raises:
      ValueError: no pass, no key for each image, an unknown method, or a negative prompt that does
        not fit.
    """
    _check(prompt, negative, keys_B, passes, method)
    rows = _rows(prompt, negative)
    if method == "cache":
        steps = _Cached(model, params, rows)
    else:
        steps = _Recomputed(model, params, rows, to_come=method == "whole")
    pyramid = model.config.pyramid
    batch = prompt.ids_BP.shape[0]
    watched = jnp.zeros(0, jnp.int32) if watched is None else watched
    features_BhwC, all_codes, draws = None, [], []
    for scale, side in enumerate(pyramid.sides):
        up_BhwC = None if scale == 0 else bicubic_resize(features_BhwC, side)
        inputs_BhwC = up_BhwC
        for index, (top_k, top_p) in enumerate(passes if scale else passes[:1]):
            hidden_BLC = steps(scale, index, inputs_BhwC)
            if negative is not None:
                strength = guidance * scale / max(len(pyramid) - 1, 1)
                hidden_BLC = guided(hidden_BLC, strength)
            logits_BLK = model.apply(params, hidden_BLC, method="code_logits")
            own_B = _fold(keys_B, scale * len(passes) + index)
            codes_BL = sampling.draw(own_B, logits_BLK, top_k, top_p)
            draws.append(Draw(scale, index, codes_BL, logits_BLK[..., watched]))
            z_BhwC = codebooks.look_up(codes_BL).reshape(batch, side, side, -1)
            inputs_BhwC = z_BhwC if scale == 0 else up_BhwC + z_BhwC
        features_BhwC = inputs_BhwC
        all_codes.append(codes_BL)
        steps.scale_is_done(scale)
    return jnp.concatenate(all_codes, axis=1), draws


def guided(hidden_RLC: jax.Array, strength: jax.Array | float) -> jax.Array:
    """(1 + t) conditional - t unconditional: float32 (B, L, C) of (2 B, L, C).

    The head is linear, so that guiding its input guides the logits, for half of the products.
    """
    conditional, unconditional = jnp.split(hidden_RLC.astype(jnp.float32), 2)
    return (1 + strength) * conditional - strength * unconditional


def _fold(keys_B: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def _check(prompt, negative, keys_B, passes, method) -> None:
    problems = [] if method in METHODS else [f"method {method!r}: one of {', '.join(METHODS)}"]
    batch, prefix = prompt.ids_BP.shape
    if not passes:
        problems.append("passes is empty; give (top_k, top_p) of at least one")
    if keys_B.shape[0] != batch:
        problems.append(f"{keys_B.shape[0]} keys for {batch} images; give one for each")
    if negative is not None and negative.ids_BP.shape not in ((batch, prefix), (1, prefix)):
        problems.append(
            f"the negative prompt is {negative.ids_BP.shape}, but {(batch, prefix)} or "
            f"{(1, prefix)} fits"
        )
    if problems:
        raise ValueError("sampling: " + "; ".join(problems))


def _rows(prompt: Prompt, negative: Prompt | None) -> Prompt:
    """The prompts, and the negative prompt of each behind them."""
    if negative is None:
        return prompt
    return Prompt(
        *(
            jnp.concatenate([x, jnp.broadcast_to(other, x.shape)])
            for x, other in zip(prompt, negative, strict=True)
        )
    )


class _Cached:
    """Computes a scale from its own tokens and the cache of those before it."""

    def __init__(self, model: Generation, params: Any, rows: Prompt):
        self.model, self.params, self.rows = model, params, rows
        count, self.prefix = rows.ids_BP.shape
        # The last code's scale is input, too: P - 1 ids before the blocks, and N positions in them.
        length = self.prefix - 1 + model.config.pyramid.tokens
        ones = jnp.ones((count, length - self.prefix), bool)
        real_RK = jnp.concatenate([rows.real_BP, ones], axis=1)
        self.mask = Mask(real_RK, model.config.blocks(self.prefix))
        self.cache = init_cache(model.config.lm, count, length, model.dtype)
        self.first_pass: tuple[jax.Array, jax.Array] | None = None

    def _apply(self, method: str, *args: Any) -> Any:
        return self.model.apply(self.params, *args, method=method)

    def __call__(self, scale: int, index: int, inputs_BhwC: jax.Array | None) -> jax.Array:
        """Last hidden states (R, L, C) of a scale; of the prefix's last position for the first."""
        if scale == 0:
            inputs_RLC, start = self._apply("embed_text", self.rows.ids_BP, True), 0
        else:
            where = self.model.config.pyramid.slices()[scale]
            inputs_RLC = _scale_tokens(self, scale, inputs_BhwC)
            start = self.prefix - 1 + where.start
        if index == 1:  # the first pass's keys and values are what later scales read
            self.first_pass = tuple(
                x[:, :, start : start + inputs_RLC.shape[1]] for x in _arrays(self.cache)
            )
        hidden_RLC, self.cache = self._apply("decode", inputs_RLC, start, self.mask, self.cache)
        return hidden_RLC if scale else hidden_RLC[:, -1:]

    def scale_is_done(self, scale: int) -> None:
        """Puts the first pass's keys and values back."""
        if self.first_pass is None:
            return
        start = self.prefix - 1 + self.model.config.pyramid.slices()[scale].start
        keys, values = (
            jax.lax.dynamic_update_slice(x, first, (0, 0, start, 0, 0))
            for x, first in zip(_arrays(self.cache), self.first_pass, strict=True)
        )
        self.cache = Cache(keys, values, self.cache.length, self.cache.visible)
        self.first_pass = None


class _Recomputed:
    """Computes a scale from the whole sequence: so far, or with zeros for the scales to come."""

    def __init__(self, model: Generation, params: Any, rows: Prompt, to_come: bool):
        self.model, self.params, self.rows, self.to_come = model, params, rows, to_come
        self.prefix = rows.ids_BP.shape[1]
        self.earlier_RLC: list[jax.Array] = []
        self.regular_RLC: jax.Array | None = None

    def _apply(self, method: str, *args: Any) -> Any:
        return self.model.apply(self.params, *args, method=method)

    def __call__(self, scale: int, index: int, inputs_BhwC: jax.Array | None) -> jax.Array:
        """Last hidden states (R, L, C) of a scale."""
        where = self.model.config.pyramid.slices()[scale]
        parts = [self._apply("embed_text", self.rows.ids_BP, True), *self.earlier_RLC]
        if scale:
            parts.append(_scale_tokens(self, scale, inputs_BhwC))
        if index == 0:
            self.regular_RLC = parts[-1]
        if self.to_come:
            count = self.model.config.pyramid.tokens - where.stop
            parts.append(jnp.zeros((parts[0].shape[0], count, parts[0].shape[2]), parts[0].dtype))
        inputs_RLC = jnp.concatenate(parts, axis=1)
        rows, length, _ = inputs_RLC.shape
        ones = jnp.ones((rows, length - self.prefix), bool)
        real_RL = jnp.concatenate([self.rows.real_BP, ones], axis=1)
        mask = Mask(real_RL, self.model.config.blocks(self.prefix))
        hidden_RLC, _ = self._apply("decode", inputs_RLC, 0, mask, None)
        before = self.prefix - 1
        return hidden_RLC[:, before + where.start : before + where.stop]

    def scale_is_done(self, scale: int) -> None:
        """Passes of later scales see this one's regular input."""
        if scale:
            self.earlier_RLC.append(self.regular_RLC)


def _scale_tokens(steps: _Cached | _Recomputed, scale: int, inputs_BhwC: jax.Array) -> jax.Array:
    """Inputs (R, L, C) of a scale's tokens, the same for prompts and negative prompts."""
    batch, _, _, channels = inputs_BhwC.shape
    tokens_BLC = steps._apply("embed_features", inputs_BhwC.reshape(batch, -1, channels), scale)
    return jnp.tile(tokens_BLC, (steps.rows.ids_BP.shape[0] // batch, 1, 1))


def _arrays(cache: Cache) -> tuple[jax.Array, jax.Array]:
    return cache.keys, cache.values
