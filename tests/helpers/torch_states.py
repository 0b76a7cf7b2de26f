"""PyTorch state dicts for tests: of our parameters, or random ones that fit a tokenizer."""

import dataclasses
import zlib

import numpy as np
import tiny

from tokenflow_jax.tokenizer import names
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.lazy import data, in_memory

WIDE = dataclasses.replace(tiny.TINY, codebook_size=48)


def to_torch(tree, table, buffers=None):
    """Return nested parameters as a state dict of contiguous arrays, the inverse of `to_flax`."""
    arrays = {path: in_memory(path, array) for path, array in rules.flatten(tree).items()}
    tensors = rules.torch_tensors(arrays, table)
    state = {name: np.array(tensor.read(), order="C") for name, tensor in tensors.items()}
    return state | dict(buffers or {})


def read_buffers(state, table):
    """Return the arrays of a state dict that are no parameters."""
    return {name: np.array(data(x)) for name, x in state.items() if table.is_buffer(name)}


def random_state(config, dtype=np.float32, seed=0):
    """Return a complete checkpoint of a tokenizer, its buffers included."""
    part = names.PART
    shapes = {name: array.shape for name, array in part.buffers(config).items()}
    for path, leaf in rules.flatten(part.template(config)).items():
        rule, found = part.table(config).find(path, leaf.shape)
        shapes |= dict.fromkeys(found, rule.torch_shape(leaf.shape))
    random = {n: np.random.default_rng([seed, zlib.crc32(n.encode())]) for n in shapes}
    return {n: random[n].standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}


def tiny_part():
    """Return the tokenizer's part with the tiny variants in place of the released ones."""
    variants = {**tiny.KINDS, "clip_again": tiny.TINY, "wide": WIDE}
    return dataclasses.replace(names.PART, variants=variants)
