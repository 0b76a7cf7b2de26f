"""Quantized kernels: how far they are from the weights, and that the model computes with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_reader import CONFIG, loss_of

from tokenflow_jax.understanding.model import Understanding
from tokenflow_jax.weights import quantized, start
from tokenflow_jax.weights.rules import flatten, unflatten

MODEL = Understanding(CONFIG)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init_params)(jax.random.key(0))


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_a_quantized_model_computes_with_the_dequantized_weights(kind, params):
    model = quantized.model_of(MODEL, kind)
    like = quantized.shapes_of(model, jnp.dtype("float32"))
    arrays = {name: np.asarray(x) for name, x in flatten(params).items()}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ours = start.take(arrays, "a path", like, jax.tree.map(lambda _: device, like))
    assert jax.tree.structure(ours) == jax.tree.structure(like)

    plain, leaves = {}, flatten(ours)
    for name, leaf in leaves.items():
        plain[name] = leaf
        if not quantized.is_quantized(leaf):
            np.testing.assert_array_equal(leaf, arrays[name])
            continue
        values = np.asarray(leaf.array.qvalue)
        if kind == "nf4":
            values = values.view(jnp.int4)
        plain[name] = quantized.dequantize(values, leaf.array.scale, kind)
        # Half a step of each channel's own scale; nf4's steps are uneven, a sixth at most.
        scale = np.abs(arrays[name]).max(axis=1, keepdims=True)
        most = {"int8": 0.5 / 127.5, "int4": 0.5 / 7.5, "nf4": 0.16}[kind]
        assert np.all(np.abs(plain[name] - arrays[name]) <= scale * most * 1.001), name
    quantized_names = {n for n, leaf in leaves.items() if quantized.is_quantized(leaf)}
    assert quantized_names == {f"lm/blocks/{layer}/kernel" for layer in quantized.LINEAR}
    np.testing.assert_allclose(loss_of(model, ours), loss_of(MODEL, unflatten(plain)), rtol=1e-6)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_parts_are_those_of_the_whole_and_layers_are_quantized_once(kind, params):
    like = flatten(quantized.shapes_of(quantized.model_of(MODEL, kind), jnp.dtype("float32")))
    name, read = "lm/blocks/mlp/up/kernel", []

    class Counted:
        array = np.asarray(flatten(params)[name])
        shape = array.shape

        def __getitem__(self, index):
            read.append(index)
            return self.array[index]

    whole = quantized.quantized(Counted.array, like[name]).array
    found = quantized.quantized(Counted(), like[name]).array
    half = (slice(0, 2), slice(0, 8), slice(12, 24))
    np.testing.assert_array_equal(found.qvalue[half], whole.qvalue.read()[half])
    every = (slice(0, 2), slice(0, found.scale.shape[1]), slice(12, 24))
    np.testing.assert_array_equal(found.scale[every], whole.scale.read()[every])
    assert len(read) == 2  # layers


def test_scales_of_four_bits_are_of_tiles_that_divide_the_inputs():
    lm = dataclasses.replace(CONFIG.lm, width=128, mlp_width=11008)
    tiles = {
        layer: quantized.settings(lm, layer, "int4")["tile_size"] for layer in quantized.LINEAR
    }
    assert tiles["attention/q"] == 64 and tiles["mlp/down"] == 64
    odd = dataclasses.replace(lm, mlp_width=352)
    assert quantized.settings(odd, "mlp/down", "nf4")["tile_size"] == 32
    assert quantized.settings(lm, "mlp/down", "int8")["tile_size"] is None


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="weights_dtype 'int3': one of int8, int4, nf4"):
        quantized.model_of(MODEL, "int3")
