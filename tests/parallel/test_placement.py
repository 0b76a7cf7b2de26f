"""Compiler options for CPUs."""

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import placement


def test_options_that_compile_fast_are_for_cpus_and_leave_what_flags_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    options = placement.fast_to_compile()
    assert options == {
        "xla_backend_optimization_level": 1,
        "xla_cpu_use_fusion_emitters": False,
    }
    assert jax.jit(jnp.sin, compiler_options=options)(0.0) == 0  # XLA knows them
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert placement.fast_to_compile() == {"xla_cpu_use_fusion_emitters": False}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{k}={v}" for k, v in options.items()))
    assert placement.fast_to_compile() is None
    monkeypatch.delenv("XLA_FLAGS")
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=None)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((2,), ("data",), abstract_device=tpu)
    ):
        assert placement.fast_to_compile() is None
