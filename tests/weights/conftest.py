"""Random checkpoints of the tiny tokenizers, and a conversion tool that knows their names."""

import dataclasses
import zlib

import numpy as np
import pytest
import tiny

from tokenflow_jax import stages as parts
from tokenflow_jax.weights.rules import flatten

WIDE = dataclasses.replace(tiny.TINY, codebook_size=48)


@pytest.fixture
def part(monkeypatch):
    """The tokenizer, with the tiny variants in place of the released ones."""
    variants = {**tiny.KINDS, "clip_again": tiny.TINY, "wide": WIDE}
    small = dataclasses.replace(parts.PARTS["tokenizer"], variants=variants)
    monkeypatch.setitem(parts.PARTS, "tokenizer", small)
    return small


@pytest.fixture
def random_state():
    """(config, dtype) -> a complete PyTorch checkpoint, its buffers included."""

    def make(config, dtype=np.float32, seed=0):
        part = parts.PARTS["tokenizer"]
        shapes = {name: array.shape for name, array in part.buffers(config).items()}
        for path, leaf in flatten(part.template(config)).items():
            rule, names = part.table(config).find(path, leaf.shape)
            shapes |= dict.fromkeys(names, rule.torch_shape(leaf.shape))
        random = {n: np.random.default_rng([seed, zlib.crc32(n.encode())]) for n in shapes}
        return {
            n: random[n].standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()
        }

    return make
