"""Answer prompts with a cache: `answer` in one program, `read` and `step` token by token."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.lm import Cache, init_cache
from tokenflow_jax.nets.sampling import draw
from tokenflow_jax.parallel import mesh
from tokenflow_jax.understanding.model import Understanding

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Decoding:
    max_new: int = 64  # tokens at most, the stop id included
    stop_ids: tuple[int, ...] = ()  # an answer ends with the first of these
    pad_id: int = 0  # fills a row after its end
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # filters of the draw, 0 is off; see `sampling.survivors`
    top_p: float = 0.0

    def __post_init__(self):
        problems = []
        if self.max_new < 1:
            problems.append(f"max_new={self.max_new} must be at least 1")
        if not self.temperature >= 0:
            problems.append(f"temperature={self.temperature} must not be negative")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            problems.append(
                f"top_k={self.top_k} and top_p={self.top_p}: 0 or more, and between 0 and 1"
            )
        if problems:
            raise ValueError("decoding: " + "; ".join(problems))


class AnswerState(flax.struct.PyTreeNode):
    ids_BN: jax.Array  # int32 (B, max_new), the tokens so far, then padding
    count: jax.Array  # int32, tokens so far
    done_B: jax.Array  # bool, True after a stop id
    logits_BV: jax.Array  # float32, of the next token
    positions_B: jax.Array  # int32, of the next token
    real_BK: jax.Array  # bool, as long as the cache; False at the prompt's padding
    cache: Cache
    keys_B: jax.Array  # one random key per row, so that its draws do not depend on the others


def start(
    model: Understanding, params: PyTree, prompt: dict[str, jax.Array], key: jax.Array,
    decoding: Decoding,
) -> AnswerState:  # fmt: skip
    """Read the prompts; return the state before the first token.

    A prompt is "ids", "places", "segments" of `data.chat.insertion.pad_rows(..., "left")`, and
    "features" (B, M, N, C).
    """
    batch, length = prompt["ids"].shape
    room = length + decoding.max_new
    cache = init_cache(model.config.lm, batch, room, model.dtype)
    hidden_BLC, cache = model.apply(
        {"params": params}, prompt["ids"], prompt["places"], prompt["segments"], prompt["features"],
        cache,
    )  # fmt: skip
    real_BL = prompt["segments"] > 0
    real_BK = jnp.pad(real_BL, ((0, 0), (0, decoding.max_new)), constant_values=True)
    logits_B1V = model.apply({"params": params}, hidden_BLC[:, -1:], method="logits")
    return AnswerState(
        jnp.full((batch, decoding.max_new), decoding.pad_id, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(batch, bool),
        logits_B1V[:, 0],
        real_BL.sum(1).astype(jnp.int32),
        real_BK,
        cache,
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)),
    )


def read(
    model: Understanding, params: PyTree, prompt: dict[str, jax.Array], cache: Cache | None,
    first: jax.Array, count: jax.Array, key: jax.Array, decoding: Decoding, room: int,
) -> AnswerState:  # fmt: skip
    """Read more of one conversation; return the state before the first token of the answer.

    Args:
      prompt: as for `start`, of one row that is padded on the right.
      cache: has the conversation's first `first` tokens, whatever lies behind them; None: nothing.
      count: of the prompt's tokens.
      room: of the cache, in tokens.
    """
    cache = cache.at(first) if cache else init_cache(model.config.lm, 1, room, model.dtype)
    hidden_1LC, cache = model.apply(
        {"params": params}, prompt["ids"], prompt["places"], prompt["segments"], prompt["features"],
        cache, method="read_on",
    )  # fmt: skip
    last_11C = jax.lax.dynamic_slice_in_dim(hidden_1LC, count - 1, 1, axis=1)
    logits_11V = model.apply({"params": params}, last_11C, method="logits")
    return AnswerState(
        jnp.full((1, decoding.max_new), decoding.pad_id, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(1, bool),
        logits_11V[:, 0],
        (first + count)[None],
        jnp.ones((1, room), bool),
        cache.at(first + count),  # the next tokens take the place of the padding
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(1)),
    )


def step(
    model: Understanding, params: PyTree, state: AnswerState, decoding: Decoding
) -> AnswerState:
    """Add one token to every row, or the padding id if the row is done."""
    chosen_B = _choose(state, decoding)
    ids_B = jnp.where(state.done_B, decoding.pad_id, chosen_B)
    done_B = state.done_B | jnp.isin(chosen_B, jnp.array(decoding.stop_ids, jnp.int32))
    logits_BV, cache = model.apply(
        {"params": params}, ids_B, state.positions_B, state.real_BK, state.cache,
        method="next_token",
    )  # fmt: skip
    return state.replace(
        ids_BN=jax.lax.dynamic_update_slice(state.ids_BN, ids_B[:, None], (0, state.count)),
        count=state.count + 1,
        done_B=done_B,
        logits_BV=logits_BV,
        positions_B=state.positions_B + 1,
        cache=cache,
    )


def _choose(state: AnswerState, decoding: Decoding) -> jax.Array:
    if not decoding.temperature:
        return jnp.argmax(state.logits_BV, axis=-1).astype(jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.count)
    logits_B1V = state.logits_BV[:, None] / decoding.temperature
    return draw(keys_B, logits_B1V, decoding.top_k, decoding.top_p)[:, 0]


def answer(
    model: Understanding, params: PyTree, prompt: dict[str, jax.Array], key: jax.Array,
    decoding: Decoding,
) -> jax.Array:  # fmt: skip
    """Decode until all rows are done; return int32 (B, max_new). Arguments as for `start`."""

    def unfinished(state: AnswerState) -> jax.Array:
        return (state.count < decoding.max_new) & ~state.done_B.all()

    state = start(model, params, prompt, key, decoding)
    state = jax.lax.while_loop(unfinished, lambda s: step(model, params, s, decoding), state)
    return state.ids_BN


def programs(model: Understanding, device_mesh: mesh.Mesh | None) -> dict[str, Callable]:
    """Return `answer`, `read` and `step` of a model, and "likelihood", jitted: (params, ...)."""

    def likelihood(params: PyTree, *arrays: PyTree) -> tuple[jax.Array, jax.Array]:
        return model.apply({"params": params}, *arrays, method="likelihood")

    partial = functools.partial
    compiled = {
        "likelihood": jax.jit(likelihood),
        "read": jax.jit(
            partial(read, model), static_argnames=("decoding", "room"), donate_argnums=2
        ),
        "answer": jax.jit(partial(answer, model), static_argnames="decoding"),
        "step": jax.jit(partial(step, model), static_argnames="decoding", donate_argnames="state"),
    }
    if device_mesh is None:
        return compiled
    return {name: mesh.bind(device_mesh, function) for name, function in compiled.items()}
