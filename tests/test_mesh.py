"""The mesh: sizes inferred, mistakes explained."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tokenflow_jax import mesh


class FakeDevice:
    """Stands for a device where only the count matters."""


def test_one_device_and_axis_names():
    m = mesh.make_mesh()
    assert m.axis_names == ("data", "fsdp", "tensor")
    assert m.shape["data"] == jax.device_count()
    assert set(m.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}) == m


def test_shardings_place_a_batch_and_a_copy():
    m = mesh.make_mesh()
    batch = jax.device_put(np.zeros((4, 2)), mesh.batch_sharding(m))
    assert batch.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert jax.device_put(np.zeros(3), mesh.replicated(m)).is_fully_replicated


@pytest.mark.parametrize(
    ("sizes", "texts"),
    [
        ({"data": 3}, ["data=3", "8 devices"]),
        ({"data": -1, "fsdp": 2}, ["mesh.fsdp=2 is not available yet", "mesh.data=-1"]),
        ({"data": -1, "tensor": -1}, ["more than one mesh size is -1"]),
        ({"data": 0}, ["mesh.data=0 must be a positive integer"]),
        ({"data": 2.0}, ["mesh.data=2.0"]),
        ({"model": 2, "data": "all"}, ["mesh.model is not an axis", "mesh.data='all'"]),
    ],
)
def test_wrong_sizes_are_explained(sizes, texts):
    with pytest.raises(ValueError) as caught:
        mesh.make_mesh(sizes, devices=[FakeDevice() for _ in range(8)])
    for text in texts:
        assert text in str(caught.value)


def test_batch_size_must_divide():
    m = mesh.make_mesh()
    mesh.check_batch_size(8 * jax.device_count(), m)
    with pytest.raises(ValueError, match="batch_size=0"):
        mesh.check_batch_size(0, m)
