"""The understanding step: what trains, microbatches, features from a table, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.train import optim
from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig
from tokenflow_jax.understanding.train import Trainer

CONFIG = UnderstandingConfig(
    LMConfig(vocabulary_size=40, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24), 9
)
TOKENIZER = TokenFlow(tiny.TINY)
VECTORS = 16


def trainer(**changes):
    options = {"optimizer": optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-2), 100)}
    return Trainer(Understanding(CONFIG), TOKENIZER, **{**options, **changes})


def a_batch(rows=4, seed=0):
    """Rows with one image each, the last without; labels are unevenly spread."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(rows):
        ids = rng.integers(1, 40, 5 + 2 * i)
        ids[0] = -200 if i < rows - 1 else 3
        labels = np.where(np.arange(len(ids)) >= 4, ids, -100)
        found.append(insertion.merge_row(ids, labels, VECTORS))
    batch = insertion.pad_rows(found, 32)
    return {**batch, "image_index": np.arange(rows, dtype=np.int32)[:, None]}


@pytest.fixture(scope="module")
def frozen():
    """Features that a tokenizer has made before."""
    table = np.random.default_rng(0).normal(size=(4, VECTORS, 9))
    return {"features": jnp.asarray(table, jnp.float32)}


def test_microbatches_weigh_every_label_alike(frozen):
    batch = jax.tree.map(jnp.asarray, a_batch())
    state = trainer().init(jax.random.key(0))
    states, metrics = [], []
    for count in (1, 4):
        after, found = jax.jit(trainer(accumulate=count).step)(state, frozen, batch)
        states.append(after.params)
        metrics.append(found)
    for other, found in zip(states[1:], metrics[1:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), states[0], other)
        for name, value in metrics[0].items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4)
    with pytest.raises(ValueError, match="does not split by accumulate=3"):
        trainer(accumulate=3).step(state, frozen, batch)


@pytest.mark.slow
def test_pictures_are_tokenized_in_the_step_without_gradient():
    """The features equal those made before, and nothing is learned by the tokenizer."""
    one, frozen = trainer(), {"tokenizer": tiny.random_params(tiny.TINY, 0)}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 1, 16, 16, 3), dtype=np.uint8)
    read = jax.jit(one.image_features)
    table = read(frozen["tokenizer"], images[:, 0])
    assert table.shape == (4, VECTORS, 9)

    def total(frozen):
        features = one.features(frozen, {"image": images})
        return features.sum(), features

    gradients, features = jax.jit(jax.grad(total, has_aux=True))(frozen)
    np.testing.assert_allclose(features, table[:, None], atol=1e-6)
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


def test_the_first_stage_trains_the_projector_alone(frozen):
    shapes = jax.eval_shape(trainer().model.init_params, jax.random.key(0))
    trainable = optim.matching(shapes, ("projector",))
    options = optim.OptimizerConfig(learning_rate=1e-2)
    one = trainer(optimizer=optim.make_optimizer(options, 100, trainable), trainable=trainable)
    state = one.init(jax.random.key(0))
    after, metrics = jax.jit(one.step)(state, frozen, a_batch())
    for name, before in state.params.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after.params[name])
        assert all(jax.tree.leaves(same)) == (name == "lm"), name
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(
        x.size for x in jax.tree.leaves(state.params["projector"])
    )
    assert metrics["gradient_norm/all"] > 0


def test_a_batch_without_labels_changes_nothing(frozen):
    one = trainer(optimizer=optax.sgd(1.0))
    state = one.init(jax.random.key(0))
    batch = a_batch()
    batch["labels"][:], batch["segments"][:] = -100, 0
    after, metrics = jax.jit(one.step)(state, frozen, batch)
    assert metrics["loss/total"] == 0 and metrics["labels"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, after.params)


def test_it_learns_what_the_pictures_say(frozen):
    """Two pictures, the same question, two answers: only the picture tells which."""
    rows = [
        insertion.merge_row(np.array([-200, 5, answer]), np.array([-100, -100, answer]), VECTORS)
        for answer in (7, 8)
    ]
    batch = insertion.pad_rows(rows, 20)
    batch = jax.tree.map(jnp.asarray, {**batch, "image_index": np.array([[0], [1]])})
    one = trainer(optimizer=optim.make_optimizer(optim.OptimizerConfig(learning_rate=3e-2), 100))
    state, step = one.init(jax.random.key(0)), jax.jit(one.step)
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
    assert metrics["loss/total"] < 0.1 and metrics["accuracy/answers"] == 1
    swapped = {**batch, "image_index": batch["image_index"][::-1]}
    assert jax.jit(one.loss)(state.params, frozen, swapped)["right"] == 0
