"""Optimisers, schedules, frozen parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenflow_jax.train import optim
from tokenflow_jax.train.optim import OptimizerConfig

PARAMS = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "decoder": jnp.ones(3)}


def test_schedules():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="cosine", warmup_steps=10, final_fraction=0.1
    )
    schedule = optim.make_schedule(config, 110)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)
    linear = optim.make_schedule(OptimizerConfig(learning_rate=2.0, schedule="linear"), 4)
    np.testing.assert_allclose([float(linear(s)) for s in (0, 2, 4)], [2, 1, 0])


def test_first_adam_step_moves_by_the_learning_rate_whatever_the_gradient():
    optimizer = optim.make_optimizer(OptimizerConfig(learning_rate=0.1), 10)
    gradients = jax.tree.map(lambda p: 100 * p, PARAMS)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.1, rtol=1e-5)


def test_clipping_is_global():
    config = OptimizerConfig(clip_norm=1.0)
    clip = optim.make_optimizer(config, 1)
    unit = optax.scale(1 / optax.tree.norm(PARAMS))
    reference = optax.chain(unit, optax.scale_by_adam(0.9, 0.95))
    ours, theirs = clip.init(PARAMS), reference.init(PARAMS)
    ours, _ = clip.update(PARAMS, ours, PARAMS)
    theirs, _ = reference.update(PARAMS, theirs, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -1e-4 * b, rtol=1e-5), ours, theirs)


def test_weight_decay_leaves_biases_alone():
    config = OptimizerConfig(name="adamw", learning_rate=1.0, weight_decay=0.5)
    optimizer = optim.make_optimizer(config, 1)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.5)
    assert jnp.abs(updates["encoder"]["bias"]).max() == jnp.abs(updates["decoder"]).max() == 0


def test_frozen_parts_get_no_gradient_and_no_update():
    marks = optim.matching(PARAMS, ("decoder", "encoder/bias"))
    assert marks == {"encoder": {"kernel": False, "bias": True}, "decoder": True}
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(optim.freeze(p, marks)))  # noqa: E731
    gradients = jax.grad(loss)(PARAMS)
    assert jnp.abs(gradients["encoder"]["kernel"]).max() == 0
    assert jnp.abs(gradients["decoder"]).min() > 0
    optimizer = optim.make_optimizer(OptimizerConfig(learning_rate=1.0), 1, marks)
    state = optimizer.init(PARAMS)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (2 + 3) + 6  # moments of 5 values
    updates, _ = optimizer.update(PARAMS, state, PARAMS)
    assert jnp.abs(updates["encoder"]["kernel"]).max() == 0
    np.testing.assert_allclose(updates["decoder"], -1.0, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\['decodr'\].*\['decoder', 'encoder'\]"):
        optim.matching(PARAMS, ("decodr",))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"name": "sgd"}, "'sgd' is not one of"),
        ({"schedule": "step"}, "'step' is not one of"),
        ({"weight_decay": 0.1}, "needs name='adamw'"),
        ({"learning_rate": -1.0}, "must not be negative"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_decay_of_all_but_biases_and_norms():
    params = {"embed": {"embedding": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)},
              "fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}  # fmt: skip
    moved = {}
    for decayed in ("kernels", "all"):
        config = OptimizerConfig("adamw", learning_rate=1.0, weight_decay=0.1, decayed=decayed)
        optimizer = optim.make_optimizer(config, 10)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        moved[decayed] = {name for name, part in updates.items() for x in jax.tree.leaves(part)
                          if np.allclose(x, -0.1)}  # fmt: skip
        assert all(np.allclose(x, 0) or np.allclose(x, -0.1) for x in jax.tree.leaves(updates))
    assert moved == {"kernels": {"fc"}, "all": {"fc", "embed"}}
    with pytest.raises(ValueError, match="decayed 'biases' is not one of"):
        OptimizerConfig(decayed="biases")


def test_muon_makes_updates_of_hidden_layers_orthogonal_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"mlp": {"kernel": jnp.asarray(rng.normal(size=(2, 6, 9)), jnp.float32)}},
        "head": {"kernel": jnp.ones((4, 4))},
    }
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    config = OptimizerConfig("muon", learning_rate=1.0, clip_norm=0.0)
    optimizer = optim.make_optimizer(config, 10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    adam = optax.scale_by_adam(0.9, 0.95, nesterov=True)
    expected, _ = adam.update(gradients, adam.init(params))
    np.testing.assert_allclose(updates["head"]["kernel"], -expected["head"]["kernel"], rtol=1e-5)
    for layer in np.asarray(updates["blocks"]["mlp"]["kernel"]):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2.5  # Newton-Schulz is rough, a gradient's is 5 or so
        assert 0.1 < np.sqrt(np.mean(layer**2)) < 0.3
