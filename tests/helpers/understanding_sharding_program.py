"""Run by tests/understanding/test_sharding.py with eight fake devices; prints one JSON object.

For every mesh, "slice,data,fsdp,tensor" or "one", with ":KIND" for adapters beside weights of that
kind: the losses of three steps and greedy answers.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.train import optim
from tokenflow_jax.understanding.answer import Decoding, answer
from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig
from tokenflow_jax.understanding.train import Trainer
from tokenflow_jax.weights import start
from tokenflow_jax.weights.lora import Adapters, LoraConfig
from tokenflow_jax.weights.rules import flatten

mesh.LEAST_SPLIT = 64  # so that the tiny model is split at all
CONFIG = UnderstandingConfig(
    LMConfig(
        vocabulary_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, remat="block"
    ),
    vision_channels=8,
)


def batch_of(rng, side):
    rows = []
    for i in range(8):
        ids = rng.integers(1, 64, 6 + i)
        ids[1] = -200
        row = insertion.merge_row(ids, np.where(np.arange(6 + i) > 3, ids, -100), 9)
        # In training, two conversations in a row: each has its own picture.
        rows.append(insertion.join_rows([row, row], 9) if side == "right" else row)
    return insertion.pad_rows(rows, 48 if side == "right" else 24, side)


def run(name):
    name, _, kind = name.partition(":")
    if name == "one":
        device_mesh = mesh.make_mesh({"data": 1}, jax.devices()[:1])
    else:
        device_mesh = mesh.make_mesh(dict(zip(mesh.AXES, map(int, name.split(",")), strict=True)))
    rng = np.random.default_rng(0)
    optimizer = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-2), 100)
    model, adapters = Understanding(CONFIG), None
    if kind:
        options = LoraConfig(4, weights=kind)
        adapters = Adapters(options, ("projector",), np.dtype(np.float32))
        model = adapters.model(model)
    trainer = Trainer(
        model, TokenFlow(TokenizerConfig()), optimizer, adapters=adapters, accumulate=1
    )
    state = trainer.init(jax.random.key(0))
    place = mesh.shardings(state, device_mesh)
    state = jax.tree.map(jax.device_put, state, place)
    if kind:  # as a stage starts from a run
        plain = dataclasses.replace(trainer, model=Understanding(CONFIG), adapters=None)
        arrays = flatten(jax.device_get(plain.init(jax.random.key(0)).params))
        state = state.replace(params=start.take(arrays, "", state.params, place.params))
    split, whole = mesh.batch_sharding(device_mesh), mesh.replicated(device_mesh)
    table = rng.normal(size=(8, 9, 8)).astype(np.float32)
    step = mesh.bind(
        device_mesh,
        jax.jit(trainer.step, in_shardings=(place, whole, split), out_shardings=(place, whole)),
    )
    batch = {**batch_of(rng, "right"), "image_index": np.arange(16).reshape(8, 2) % 8}
    losses = []
    for _ in range(3):
        state, metrics = step(state, {"features": table}, jax.device_put(batch, split))
        losses.append(float(metrics["loss/total"]))
    prompt = {**batch_of(rng, "left"), "features": table[:, None]}
    del prompt["labels"]
    decoding = Decoding(6, (3,), 0)
    params = state.params
    if adapters:
        params = adapters.join(params, adapters.take(params))
    greedy = functools.partial(answer, model, key=jax.random.key(0), decoding=decoding)
    ids = mesh.bind(
        device_mesh,
        jax.jit(lambda p, q: greedy(p, q), in_shardings=(place.params, split), out_shardings=whole),
    )(params, jax.device_put(prompt, split))
    parts = [x.sharding.spec for x in jax.tree.leaves(state.params)]
    return {
        "losses": losses,
        "ids": np.asarray(ids).tolist(),
        "split": sum(any(spec) for spec in parts) / len(parts),
    }


if __name__ == "__main__":
    print(json.dumps([run(name) for name in sys.argv[1:]]))
