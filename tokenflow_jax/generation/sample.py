"""Sample images from the generation model, scale by scale, in one compiled program.

The prefix is computed once; then each scale is one forward pass of its own tokens:

    prefix   P tokens -> code of the first scale
    scale 2  4 tokens -> its codes       (reads the cache and adds its keys and values)
    ...

Further passes over a scale ("refinement") add the scale's own codes to its input and draw all of
them again. Later scales read what the FIRST pass put into the cache: the reference recomputes
everything, with the regular input of every scale but the current one.

    codes_BN = jax.jit(Sampler(model, pad_id))(params, codebooks, ids_BP, negative_1P, keys_B, 7.5)
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenflow_jax.generation.edit import Edit
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.nets import sampling
from tokenflow_jax.nets.lm import Cache, init_cache
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.tokenizer.quantizer import Codebooks

# (top_k, top_p) of each pass over a scale: the reference's settings for one, two and three passes.
PASSES: dict[int, tuple[tuple[int, float], ...]] = {
    1: ((600, 0.6),),
    2: ((1200, 0.8), (1, 0.0)),
    3: ((1200, 0.8), (100, 0.8), (1, 0.0)),
}
GUIDANCE = 7.5
# The reference's negative prompt, since its training drops no captions.
REFERENCE_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sampling options; the defaults are the reference's."""

    guidance: float = GUIDANCE  # strength at the finest scale; 0 samples without, in half the time
    # (top_k, top_p) of each pass over a scale, 0 for no filter; or the key of one of PASSES.
    passes: tuple[tuple[int, float], ...] | int = 1
    negative_prompt: str = REFERENCE_NEGATIVE  # "" for a model trained with dropped captions
    seed: int = 0  # of all draws
    history: bool = True  # in a chat, draw with what was said before, not from the request alone

    def __post_init__(self):
        passes = self.passes
        if isinstance(passes, int):
            if passes not in PASSES:
                raise ValueError(f"passes {passes} must be one of {sorted(PASSES)}")
            passes = PASSES[passes]
        object.__setattr__(self, "passes", tuple((int(k), float(p)) for k, p in passes))

    @classmethod
    def recorded(cls, saved: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that a run's config records."""
        known, sampling = (
            {field.name for field in dataclasses.fields(cls)},
            saved.get("sampling", {}),
        )
        return cls(**{name: sampling[name] for name in known & sampling.keys()})

    def check(self, config: GenerationConfig) -> None:
        """Raise ValueError naming all options that do not suit the model."""
        size, problems = config.codebook_size, []
        if not 0 <= self.guidance < math.inf:
            problems.append(f"guidance {self.guidance} must not be negative or infinite")
        if not self.passes:
            problems.append("there is no pass")
        for top_k, top_p in self.passes:
            if not 0 <= top_k <= size:
                problems.append(f"top_k {top_k} must be 0 (off) to {size}, the codebook's size")
            if not 0 <= top_p <= 1:
                problems.append(f"top_p {top_p} must be 0 (off) to 1")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


class Draw(NamedTuple):
    """One pass over one scale, both counted from 0."""

    scale: int
    index: int
    codes_BL: jax.Array
    logits_BLK: jax.Array  # guided, before the filter


class Prefix(NamedTuple):
    """What R rows have read before the first scale: a prompt, or any history before `<img>`."""

    cache: Cache  # with room for the codes behind `start`
    hidden_R1C: jax.Array  # of the last token, after the norm
    start: jax.Array | int  # the cache's first free entry; a traced one reads the cache whole
    real_RK: jax.Array  # bool, False at entries before `start` that a row does not read

    def mask(self, stop: jax.Array | int) -> jax.Array:
        """Return which entries before `stop` are read: bool (R, 1, K)."""
        keys = stop if isinstance(stop, int) else self.real_RK.shape[1]
        index_K = jnp.arange(keys)
        real_RK = self.real_RK[:, :keys] | (index_K >= self.start)
        return (real_RK & (index_K < stop))[:, None]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampling loop as a function of parameters and prompts; jit it."""

    model: Generation
    pad_id: int  # of padding in prefixes
    # (top_k, top_p) of each pass; the first scale, with no input of its own to refine, has one.
    passes: tuple[tuple[int, float], ...] = PASSES[1]

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the codes (B, N), coarse to fine; arguments as for `draws`."""
        codes = {draw.scale: draw.codes_BL for draw in self.draws(*args, **kwargs)}  # last passes
        return jnp.concatenate(list(codes.values()), axis=1)

    def draws(
        self,
        params: Any,
        codebooks: Codebooks,
        ids_BP: jax.Array,
        negative_BP: jax.Array | None,
        keys_B: jax.Array,
        guidance: jax.Array | float = GUIDANCE,
        edit: Edit | None = None,
    ) -> Iterator[Draw]:
        """Yield every pass over every scale.

        Args:
          params, codebooks: the model's and the tokenizer's.
          ids_BP: prefixes of one length: text, padded on the left, and `<img>`.
          negative_BP: prefixes to be guided away from, one per image or one for all; or None.
          keys_B, guidance, edit: see `scales`.
        """
        self._check(ids_BP, negative_BP, keys_B)
        prefix = self.begin(params, ids_BP, negative_BP)
        return self.scales(params, codebooks, prefix, keys_B, guidance, edit)

    def begin(self, params: Any, ids_BP: jax.Array, negative_BP: jax.Array | None) -> Prefix:
        """Read prefixes into a cache that holds the scales, too."""
        config, length = self.model.config, ids_BP.shape[1]
        rows_RP = ids_BP  # of the model: the prompts, then the negative prompt of each
        if negative_BP is not None:
            rows_RP = jnp.concatenate([ids_BP, jnp.broadcast_to(negative_BP, ids_BP.shape)])
        # The last code's scale is input, too: P - 1 ids before the blocks, and N positions in them.
        room = length - 1 + config.pyramid.tokens
        padding = ((0, 0), (0, room - length))
        real_RK = jnp.pad(rows_RP != self.pad_id, padding, constant_values=True)
        cache = init_cache(config.lm, rows_RP.shape[0], room, self.model.dtype)
        mask, variables = Mask(real_RK, config.blocks(length)), {"params": params}
        inputs_RPC = self.model.apply(variables, rows_RP, True, method="embed_text")
        hidden_RPC, cache = self.model.apply(variables, inputs_RPC, 0, mask, cache, method="decode")
        return Prefix(cache, hidden_RPC[:, -1:], length, real_RK)

    def scales(
        self,
        params: Any,
        codebooks: Codebooks,
        prefix: Prefix,
        keys_B: jax.Array,
        guidance: jax.Array | float = GUIDANCE,
        edit: Edit | None = None,
    ) -> Generator[Draw, None, Cache]:
        """Yield every pass over every scale after a prefix; return the cache.

        Args:
          params, codebooks: the model's and the tokenizer's.
          prefix: of B rows; or of 2 B, the last B of which are to be guided away from.
          keys_B: one random key per image; a row depends on its own key and prefix only.
          guidance: strength g >= 0. With t = g i / (K - 1) for scale i of K, the logits are
            (1 + t) conditional - t unconditional: unguided at the first scale, g at the last.
            The cache has all inputs but the one after the last code.
          edit: the picture whose codes are kept in places.
        """
        pyramid, cache = self.model.config.pyramid, prefix.cache
        apply = functools.partial(self.model.apply, {"params": params})
        batch, rows = keys_B.shape[0], prefix.hidden_R1C.shape[0]
        features_BhwC = None  # what the next scale's input comes from, at the latest one's size
        residual_BHWC = kept_BL = z_BLC = None  # of an edit
        if edit is not None:
            residual_BHWC = jnp.tile(edit.map_1HWC, (batch, 1, 1, 1))

        for scale, (side, where) in enumerate(zip(pyramid.sides, pyramid.slices(), strict=True)):
            start, size = prefix.start + where.start - 1, side * side
            mask_R1K = prefix.mask(start + size) if scale else None
            up_BhwC = bicubic_resize(features_BhwC, side) if scale else None
            inputs_BhwC, first_pass = up_BhwC, None
            if edit is not None:
                kept_BL, z_BLC = edit.kept(scale, residual_BHWC, codebooks)
            for index, (top_k, top_p) in enumerate(self.passes if scale else self.passes[:1]):
                hidden_RLC = prefix.hidden_R1C
                if scale:
                    features_BLC = inputs_BhwC.reshape(batch, size, -1)
                    tokens_BLC = apply(features_BLC, scale, method="embed_features")
                    inputs_RLC = jnp.tile(tokens_BLC, (rows // batch, 1, 1))
                    if index == 1:
                        first_pass = _entries(cache, start, size)
                    run = (inputs_RLC, start, mask_R1K, cache, scale)
                    hidden_RLC, cache = apply(*run, method="decode")
                if rows > batch:
                    hidden_RLC = guided(hidden_RLC, guidance * scale / max(len(pyramid) - 1, 1))
                logits_BLK = apply(hidden_RLC, method="code_logits")
                fold = functools.partial(jax.random.fold_in, data=scale * len(self.passes) + index)
                codes_BL = sampling.draw(jax.vmap(fold)(keys_B), logits_BLK, top_k, top_p)
                if edit is not None:
                    codes_BL = edit.put(scale, codes_BL, kept_BL)
                yield Draw(scale, index, codes_BL, logits_BLK)
                vectors_BLC = codebooks.look_up(codes_BL)
                z_BhwC = vectors_BLC.reshape(batch, side, side, -1)
                inputs_BhwC = up_BhwC + z_BhwC if scale else z_BhwC
            residual = self.model.config.scale_inputs == "residual"
            features_BhwC = z_BhwC if residual else inputs_BhwC
            if edit is not None:
                residual_BHWC = edit.left_over(scale, residual_BHWC, vectors_BLC, z_BLC)
            if first_pass is not None:
                cache = _with_entries(cache, start, first_pass)
        return cache

    def _check(self, ids_BP, negative_BP, keys_B) -> None:
        problems, (batch, prefix) = [], ids_BP.shape
        if not self.passes:
            problems.append("passes is empty; give (top_k, top_p) of at least one")
        if keys_B.shape[0] != batch:
            problems.append(f"{keys_B.shape[0]} keys for {batch} images; give one for each")
        if negative_BP is not None and negative_BP.shape not in ((batch, prefix), (1, prefix)):
            problems.append(
                f"the negative prefix is {negative_BP.shape}; {(batch, prefix)} or {(1, prefix)} "
                "fits"
            )
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


def guided(hidden_RLC: jax.Array, strength: jax.Array | float) -> jax.Array:
    """Return (1 + t) conditional - t unconditional: float32 (B, L, C) of (2 B, L, C)."""
    # The head is linear, so guiding its input guides the logits, for half the products.
    conditional, unconditional = jnp.split(hidden_RLC.astype(jnp.float32), 2)
    return (1 + strength) * conditional - strength * unconditional


# Only a scale's own entries are kept aside: a second whole cache would double the memory.
def _entries(cache: Cache, start: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
    keys, values = (
        jax.lax.dynamic_slice_in_dim(x, start, count, axis=2) for x in (cache.keys, cache.values)
    )
    return keys, values


def _with_entries(
    cache: Cache, start: jax.Array | int, entries: tuple[jax.Array, jax.Array]
) -> Cache:
    keys, values = (
        jax.lax.dynamic_update_slice(x, new, (0, 0, start, 0, 0))
        for x, new in zip((cache.keys, cache.values), entries, strict=True)
    )
    return dataclasses.replace(cache, keys=keys, values=values)


def image_keys(prompts: Sequence[str], numbers: Sequence[int], seed: int) -> jax.Array:
    """Return a key per image, of its prompt, its number and the seed."""
    hashes = [zlib.crc32(prompt.encode(errors="replace")) for prompt in prompts]

    def key(prompt: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), number)

    return jax.vmap(key)(jnp.array(hashes, jnp.uint32), jnp.array(numbers, jnp.uint32))
