"""Sampling without a cache, as the reference does it: every pass computes the sequence anew.

What `generation.sample.Sampler` must equal, and what `benchmarks.generation` compares it with.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.generation.sample import Draw, Sampler, guided
from tokenflow_jax.nets import sampling
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.nets.resize import bicubic_resize

METHODS = ("so_far", "whole")


def positions(config, before, length) -> np.ndarray:
    """Rotary positions of a sequence with `before` tokens before its first scale's input."""
    own = [(i, i, i) for i in range(before)]
    for scale, side in enumerate(config.scales[1:], 1):
        for row in range(side):
            for column in range(side):
                cell = (scale, *((x + 0.5) / side * config.scales[-1] for x in (row, column)))
                own.append([before - 1 + x for x in cell])
    own += [(i, i, i) for i in range(len(own), length)]
    own = np.array(own[:length], np.float32)
    return own if config.rope == "3d" else np.arange(length)


def _decode(model, inputs_BLC, mask, prefix):
    at = positions(model.config, prefix, inputs_BLC.shape[1])
    return model.lm(inputs_BLC, jnp.asarray(at)[None], mask)[0]


def draws(
    sampler: Sampler, method, params, codebooks, ids_BP, negative_BP, keys_B, guidance
) -> list[Draw]:
    """As `Sampler.draws`; "so_far" computes the prefix and the scales up to the current one,
    "whole" the whole sequence, with zeros for the scales to come.
    """
    model, pyramid = sampler.model, sampler.model.config.pyramid
    (batch, prefix), variables = ids_BP.shape, {"params": params}
    rows_RP = jnp.concatenate([ids_BP, jnp.broadcast_to(negative_BP, ids_BP.shape)])
    earlier = [model.apply(variables, rows_RP, True, method="embed_text")]
    features, found = None, []
    for scale, (side, where) in enumerate(zip(pyramid.sides, pyramid.slices(), strict=True)):
        up = None if scale == 0 else bicubic_resize(features, side)
        inputs, regular = up, []
        for index, (top_k, top_p) in enumerate(sampler.passes if scale else sampler.passes[:1]):
            own = []
            if scale:
                tokens = inputs.reshape(batch, side * side, -1)
                tokens = model.apply(variables, tokens, scale, method="embed_features")
                own = [jnp.concatenate([tokens, tokens])]
            if index == 0:  # what passes of later scales see
                regular = own
            parts = [*earlier, *own]
            if method == "whole":
                shape = (len(rows_RP), pyramid.tokens - where.stop, parts[0].shape[2])
                parts.append(jnp.zeros(shape, parts[0].dtype))
            whole = jnp.concatenate(parts, axis=1)
            real = jnp.pad(
                rows_RP != sampler.pad_id,
                ((0, 0), (0, whole.shape[1] - prefix)),
                constant_values=True,
            )
            mask = Mask(real, model.config.blocks(prefix))
            hidden = model.apply(variables, whole, mask, prefix, method=_decode)
            hidden = hidden[:, prefix - 1 + where.start : prefix - 1 + where.stop]
            hidden = guided(hidden, guidance * scale / max(len(pyramid) - 1, 1))
            logits = model.apply(variables, hidden, method="code_logits")
            number = scale * len(sampler.passes) + index
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
            codes = sampling.draw(keys, logits, top_k, top_p)
            found.append(Draw(scale, index, codes, logits))
            z = codebooks.look_up(codes).reshape(batch, side, side, -1)
            inputs = z if scale == 0 else up + z
        features = z if model.config.scale_inputs == "residual" else inputs
        earlier += regular
    return found
