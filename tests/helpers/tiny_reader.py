"""A tiny understanding model and a batch for it, for tests of adapters and quantized weights."""

import jax
import numpy as np
import tiny

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.understanding.model import UnderstandingConfig
from tokenflow_jax.understanding.train import Trainer

CONFIG = UnderstandingConfig(
    LMConfig(
        vocabulary_size=40, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, qkv_bias=True
    ),
    9,
)


def a_batch():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        ids = rng.integers(1, 40, 9)
        ids[0] = -200
        rows.append(insertion.merge_row(ids, np.where(np.arange(9) > 3, ids, -100), 4))
    batch = insertion.pad_rows(rows, 16)
    return {**batch, "image_index": np.arange(2, dtype=np.int32)[:, None]}


FROZEN = {"features": np.random.default_rng(1).normal(size=(2, 4, 9)).astype(np.float32)}


def loss_of(model, params):
    plain = Trainer(model, TokenFlow(tiny.TINY), None)
    return jax.jit(lambda p: plain.loss(p, FROZEN, a_batch())["loss"])(params)
