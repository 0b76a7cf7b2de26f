"""Adapters on a tiny understanding model: what trains, the gradient, merged weights."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_reader import CONFIG, FROZEN, a_batch, loss_of

from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.train import optim
from tokenflow_jax.understanding.model import Understanding
from tokenflow_jax.understanding.train import Trainer
from tokenflow_jax.weights import lora
from tokenflow_jax.weights.lazy import in_memory
from tokenflow_jax.weights.lora import Adapters, LoraConfig
from tokenflow_jax.weights.rules import flatten, unflatten


def trainer_of(config=CONFIG, dtype=jnp.float32, trainable=("projector",), **options):
    adapters = Adapters(LoraConfig(**{"rank": 3, "alpha": 6.0, **options}), trainable, dtype)
    return Trainer(
        adapters.model(Understanding(config, dtype)),
        TokenFlow(tiny.TINY),
        optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-2), 100),
        adapters=adapters,
    )


def arrays_of(params):
    """Arrays by the names that checkpoints give them."""
    return {
        (name := jax.tree_util.keystr(path, simple=True, separator="/")): in_memory(name, leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def merged(trainer, params):
    arrays = lora.merged(arrays_of(params), dataclasses.asdict(trainer.adapters.config))
    return unflatten({name: tensor.read() for name, tensor in arrays.items()})


@pytest.fixture(scope="module", params=["auto", "int8", "nf4"])
def trained(request):
    """Three steps with frozen weights of a kind: the trainer, the state before and after."""
    trainer = trainer_of(weights=request.param)
    first = jax.jit(trainer.init)(jax.random.key(0))
    state, step = first, jax.jit(trainer.step)
    losses = []
    for _ in range(3):
        state, metrics = step(state, FROZEN, a_batch())
        losses.append(float(metrics["loss/total"]))
    assert losses[2] < losses[0]
    return trainer, first, state


def test_only_adapters_and_what_is_named_train(trained):
    _, first, state = trained
    before, after = arrays_of(first.params), arrays_of(state.params)
    moved = {name for name in before if (before[name].read() != after[name].read()).any()}
    wanted = {name for name in before if "_lora_" in name or name.startswith("projector")}
    assert moved == wanted and len([name for name in wanted if "_lora_" in name]) == 2 * 7


def test_the_optimizer_holds_moments_of_what_trains_alone(trained):
    trainer, _, state = trained
    trains = sum(x.size for x in jax.tree.leaves(trainer.adapters.take(state.params)))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * trains
    names = arrays_of(state.opt_state)
    assert not any(name.endswith(("kernel", "embedding", "qvalue")) and "lm/" in name
                   for name in names)  # fmt: skip


def test_merged_weights_compute_what_the_adapters_do(trained):
    """And a model that has not trained yet computes what its base does."""
    trainer, first, state = trained
    for params in (first.params, state.params):
        plain = merged(trainer, params)
        assert flatten(plain).keys() == flatten(Understanding(CONFIG).init_params(
            jax.random.key(0))).keys()  # fmt: skip
        ours = loss_of(trainer.model, trainer.adapters.join(params, trainer.adapters.take(params)))
        np.testing.assert_allclose(ours, loss_of(Understanding(CONFIG), plain), rtol=1e-5)


def test_the_gradient_is_that_of_the_merged_kernel():
    trainer = trainer_of(modules=("q", "mlp/.*"))
    state = jax.jit(trainer.init)(jax.random.key(0))
    rng = np.random.default_rng(2)
    trained = jax.tree.map(  # B is 0 at first, which hides A's gradient
        lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32),
        trainer.adapters.take(state.params),
    )
    assert len([n for n in flatten(trained) if "_lora_" in n]) == 2 * 4

    def ours(trained):
        params = trainer.adapters.join(state.params, trained)
        return trainer.loss(params, FROZEN, a_batch())["loss"]

    plain = Trainer(Understanding(CONFIG), TokenFlow(tiny.TINY), None)

    def reference(trained):
        flat = flatten(state.params) | flatten(trained)
        names = [name for name in flat if name.endswith("_lora_a")]
        for name in names:
            kernel = name.removesuffix("_lora_a")
            flat[kernel] += 2.0 * flat.pop(name) @ flat.pop(f"{kernel}_lora_b")
        return plain.loss(unflatten(flat), FROZEN, a_batch())["loss"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.jit(jax.grad(ours))(trained),
        jax.jit(jax.grad(reference))(trained),
    )


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_bfloat16_keeps_adapters_in_float32(weights):
    """The layers' kernels are bfloat16 or less; the recomputed blocks are as in large recipes."""
    config = dataclasses.replace(CONFIG, lm=dataclasses.replace(CONFIG.lm, remat="block"))
    trainer = trainer_of(config, jnp.bfloat16, weights=weights)
    state, metrics = jax.jit(trainer.step)(
        jax.jit(trainer.init)(jax.random.key(0)), FROZEN, a_batch()
    )
    assert np.isfinite(metrics["loss/total"])
    dtypes = {name: x.dtype for name, x in arrays_of(state.params).items()}
    assert dtypes["lm/blocks/mlp/up/kernel_lora_a"] == jnp.float32
    assert dtypes["lm/embed/embedding"] == jnp.bfloat16
    assert dtypes["lm/blocks/norm1/scale"] == dtypes["projector/fc1/kernel"] == jnp.float32
    array, held = {"auto": ("", jnp.bfloat16), "int4": ("/array/qvalue", jnp.int4)}[weights]
    assert dtypes[f"lm/blocks/mlp/up/kernel{array}"] == held


def test_wrong_options_are_named_together():
    with pytest.raises(ValueError) as error:
        LoraConfig(-1, modules=("qkv", "("), weights="int3")
    for text in ("rank=-1", "'qkv' matches none of attention/q", "'('", "'int3' is not one of"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="need a rank above 0"):
        LoraConfig(weights="nf4")
    trainer = trainer_of(weights="int8", trainable=("eyes", "lm/blocks/mlp"))
    with pytest.raises(ValueError, match=r"'eyes'.*lm/blocks/mlp.*which is quantized"):
        trainer.init(jax.random.key(0))


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenflow_jax\[lora\]'"):
        trainer_of()
