"""What programs that run seldom are compiled with."""

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import placement


def test_programs_that_run_seldom_compile_fast_on_cpus_unless_flags_say_how(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    options = placement.seldom_run()
    assert options == {
        "xla_backend_optimization_level": 1,
        "xla_cpu_use_fusion_emitters": False,
    }
    assert jax.jit(jnp.sin, compiler_options=options)(0.0) == 0  # XLA knows them
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert placement.seldom_run() == {"xla_cpu_use_fusion_emitters": False}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{k}={v}" for k, v in options.items()))
    assert placement.seldom_run() is None
    monkeypatch.delenv("XLA_FLAGS")
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=None)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((2,), ("data",), abstract_device=tpu)
    ):
        assert placement.seldom_run() is None
