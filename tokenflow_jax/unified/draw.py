"""Draw a picture where a conversation stands, behind what its cache holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tokenflow_jax.generation.sample import Prefix, Sampler
from tokenflow_jax.nets.cache import Cache
from tokenflow_jax.nets.lm import init_cache
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.unified.model import Unified

PyTree = Any


def begin(
    model: Unified,
    params: PyTree,
    prompt: Mapping[str, jax.Array],
    cache: Cache | None,
    first: jax.Array,
    count: jax.Array,
    empty_1P: jax.Array | None,
    *,
    room: int,
) -> Prefix:
    """Read on up to `<img>`.

    Args:
      prompt, cache, first, count, room: as for `understanding.answer.read`; behind the prompt's
        `count` tokens stands the place of the picture's first code.
      empty_1P: ids of a conversation that asks for nothing, up to `<img>`, to be guided away from;
        None for no guidance.
    """
    variables, config = {"params": params}, model.config
    cache = cache.at(first) if cache else init_cache(config.lm, 1, room, model.dtype)
    hidden_1LC, cache = model.apply(
        variables, prompt["ids"], prompt["places"], prompt["segments"], prompt["features"], cache,
        method="read_on",
    )  # fmt: skip
    hidden_R1C = jax.lax.dynamic_slice_in_dim(hidden_1LC, count - 1, 1, axis=1)
    start, index_K = first + count, jnp.arange(room)
    real_RK = jnp.ones((1, room), bool)
    if empty_1P is not None:
        # It ends where the conversation does, and has nothing before it.
        length = empty_1P.shape[1]
        begin = start - length
        real_1K = index_K >= begin
        mask_1PK = (real_1K & (index_K <= begin + jnp.arange(length)[:, None]))[None]
        inputs_1PC = model.apply(variables, empty_1P, True, method="embed_text")
        other = init_cache(config.lm, 1, room, model.dtype)
        hidden_1PC, other = model.apply(
            variables, inputs_1PC, begin, mask_1PK, other, method="decode"
        )
        hidden_R1C = jnp.concatenate([hidden_R1C, hidden_1PC[:, -1:]])
        real_RK = jnp.concatenate([real_RK, real_1K[None]])
        keys, values = (
            jnp.concatenate([getattr(cache, name), getattr(other, name)], axis=1)
            for name in ("keys", "values")
        )
        cache = dataclasses.replace(cache, keys=keys, values=values)
    return Prefix(cache, hidden_R1C, start, real_RK)


def draw(
    model: Unified,
    params: PyTree,
    codebooks: Codebooks,
    cache: Cache,
    prefix: Prefix,
    key_1: jax.Array,
    guidance: jax.Array,
    *,
    passes: tuple[tuple[int, float], ...],
) -> tuple[jax.Array, Cache]:
    """Return the codes (1, N) of a picture, and the cache of all rows without the last one.

    This is what takes long to compile, and it depends on the room of the cache alone. Arguments are
    those of `Sampler.scales`, but that the prefix's cache comes by itself, to be given away.
    """
    prefix = prefix._replace(cache=cache)
    scales = Sampler(model, 0, passes).scales(params, codebooks, prefix, key_1, guidance)
    codes: dict[int, jax.Array] = {}
    while True:
        try:
            one = next(scales)
        except StopIteration as end:
            cache = end.value
            break
        codes[one.scale] = one.codes_BL
    codes_1N = jnp.concatenate(list(codes.values()), axis=1)
    return codes_1N, cache.at(prefix.start + codes_1N.shape[1] - 1)
