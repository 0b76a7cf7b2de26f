"""The frozen tokenizer in a language model's step: precision of its encoders and its quantizer."""

from collections import Counter

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokenflow_jax.tokenizer.frozen import image_codes
from tokenflow_jax.tokenizer.model import TokenFlow

MODEL = TokenFlow(tiny.TINY)
IMAGES = np.random.default_rng(0).integers(
    0, 256, (4, tiny.TINY.image_size, tiny.TINY.image_size, 3), np.uint8
)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.TINY, 0)


def products(jaxpr, found):
    """Count the products of a program by the precision and the dtype of their operands."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            precision = equation.params["precision"]
            name = str(precision[0] if isinstance(precision, tuple) else None)
            found[name, str(equation.invars[0].aval.dtype)] += 1
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jex_core.ClosedJaxpr | jex_core.Jaxpr)
        ):
            if isinstance(value, jex_core.ClosedJaxpr):
                products(value.jaxpr, found)
            elif isinstance(value, jex_core.Jaxpr):
                products(value, found)
    return found


def counted(function, *arguments):
    return products(jax.make_jaxpr(function)(*arguments).jaxpr, Counter())


@pytest.mark.parametrize(
    "precision,encoders",
    [("high", ("HIGH", "float32")), ("bfloat16", ("None", "bfloat16"))],
)
def test_only_the_encoders_are_computed_at_the_precision(params, precision, encoders):
    exact = counted(lambda p, x: image_codes(MODEL, p, x), params, IMAGES)
    assert set(exact) == {("HIGHEST", "float32")}
    found = counted(lambda p, x: image_codes(MODEL, p, x, precision), params, IMAGES)
    side = tiny.TINY.scales[-1]
    features = jnp.zeros((4, side, side, tiny.TINY.code_channels))
    with jax.default_matmul_precision("highest"):
        quantizer = counted(
            lambda p, x: MODEL.apply({"params": p}, x, method="quantize"), params, features
        )
    assert found[encoders] > 3
    assert found["HIGHEST", "float32"] == quantizer["HIGHEST", "float32"] > 0
    assert found.total() == exact.total()


def test_bfloat16_encoders_change_some_codes_of_most_pictures_little(params):
    exact = np.asarray(jax.jit(lambda p, x: image_codes(MODEL, p, x))(params, IMAGES))
    high = np.asarray(jax.jit(lambda p, x: image_codes(MODEL, p, x, "high"))(params, IMAGES))
    rough = np.asarray(jax.jit(lambda p, x: image_codes(MODEL, p, x, "bfloat16"))(params, IMAGES))
    np.testing.assert_array_equal(high, exact)  # on a CPU both are float32
    assert rough.dtype == exact.dtype and np.mean(rough == exact) > 0.5
