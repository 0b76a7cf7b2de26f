"""The choice of attention's kernel, its check against XLA, and what cuDNN's is called with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.nets import attention as attention_lib
from tokenflow_jax.nets.attention import attention, choose
from tokenflow_jax.nets.masks import Blocks, Mask


@pytest.mark.parametrize(
    ("here", "target", "proved", "kernel"),
    [
        ("gpu", "gpu", True, "cudnn"),
        ("gpu", "gpu", False, "xla"),
        ("tpu", "tpu", True, "splash"),
        ("tpu", "tpu", False, "xla"),
        ("cpu", "gpu", False, "cudnn"),  # compiling for what is not here: nothing can be run
        ("cpu", "tpu", False, "splash"),
        ("cpu", "cpu", True, "xla"),
    ],
)
def test_auto_takes_a_kernel_that_proves_itself(monkeypatch, here, target, proved, kernel):
    monkeypatch.setattr(attention_lib.placement, "platform", lambda: target)
    monkeypatch.setattr(jax, "default_backend", lambda: here)
    monkeypatch.setattr(attention_lib, "proves_itself", lambda *_: proved)
    assert choose("auto", Mask(), jnp.bfloat16, (2, 100, 4, 128), False) == kernel
    assert choose("auto", Mask(), jnp.bfloat16, (2, 100, 4, 128), True) == "xla"  # with a cache


def test_devices_of_the_mesh_decide_where_a_program_runs():
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose("cudnn", Mask(), jnp.bfloat16, (2, 100, 4, 128), False) == "cudnn"


def masked_wrongly(q, k, v, mask):
    return attention(q, k, v, dataclasses.replace(mask, blocks=Blocks()).allowed(190, 190))


def without_gradient(q, k, v, mask):
    return attention(q, jax.lax.stop_gradient(k), v, mask.allowed(190, 190))


def without_numbers(q, k, v, mask):
    return attention(q, k, v, mask.allowed(190, 190)) * jnp.nan


def test_a_wrong_kernel_is_found():
    def right(q, k, v, mask):
        return attention(q, k, v, mask.allowed(190, 190))

    assert attention_lib.difference_from_xla(right, 16, "bfloat16") == 0
    for wrong in (masked_wrongly, without_gradient):
        assert attention_lib.difference_from_xla(wrong, 16, "bfloat16") > 0.1
    assert np.isnan(attention_lib.difference_from_xla(without_numbers, 16, "bfloat16"))


def test_cudnn_reads_masks_as_xla_does(monkeypatch):
    """The library's own plain form stands in for the kernel: the arguments are what is tested."""
    plain = jax.nn.dot_product_attention
    calls = []

    def stand_in(*arrays, implementation, **options):
        calls.append(options)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q = jax.random.normal(jax.random.key(0), (2, 33, 4, 16))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 33, 2, 16))
    real = jnp.arange(33) >= jnp.array([[0], [7]])
    segments = jnp.where(real, 1 + (jnp.arange(33) >= 20), 0)
    blocks = Mask(real, Blocks(12, (1, 4, 16)))
    for mask, causal, dense in (
        (Mask(), True, False),
        (Mask(real), True, True),
        (Mask(real, segments_BK=segments), True, True),
        (blocks, False, True),
        (blocks.allowed(33, 33), False, True),
    ):
        allowed = mask.allowed(33, 33) if isinstance(mask, Mask) else mask
        got, want = attention(q, k, v, mask, "cudnn"), attention(q, k, v, allowed)
        rows = real if dense else jnp.ones_like(real)
        np.testing.assert_allclose(got[rows], want[rows], atol=1e-5)
        assert calls[-1]["is_causal"] == causal and (calls[-1]["mask"] is not None) == dense


@pytest.mark.slow
def test_splash_attention_proves_itself(monkeypatch):
    interpreted = functools.partial(attention_lib._splash, interpret=True)
    monkeypatch.setattr(attention_lib, "_splash", interpreted)
    attention_lib.proves_itself.cache_clear()
    assert attention_lib.proves_itself("splash", 64, "bfloat16")
    attention_lib.proves_itself.cache_clear()
