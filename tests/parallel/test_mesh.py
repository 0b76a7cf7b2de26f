"""The mesh: inferred sizes, explained mistakes, shardings of parameters."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tokenflow_jax.parallel import mesh


class FakeDevice:
    """Stands for a device where only the count matters."""


def test_one_device_and_axis_names():
    m = mesh.make_mesh()
    assert m.axis_names == ("slice", "data", "fsdp", "tensor")
    assert m.shape["data"] == jax.device_count()
    assert set(m.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}) == m


def test_shardings_place_a_batch_and_a_copy():
    m = mesh.make_mesh()
    batch = jax.device_put(np.zeros((4, 2)), mesh.batch_sharding(m))
    assert batch.sharding.spec == PartitionSpec(("slice", "data", "fsdp"))
    assert jax.device_put(np.zeros(3), mesh.replicated(m)).is_fully_replicated


@pytest.mark.parametrize(
    ("sizes", "texts"),
    [
        ({"data": 3}, ["data=3", "8 devices"]),
        ({"data": -1, "fsdp": 3}, ["fsdp=3", "8 devices"]),
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


def abstract(**sizes):
    return mesh.make_abstract_mesh(sizes, 8)


def test_sizes_are_inferred_without_devices():
    assert dict(abstract(fsdp=2, tensor=2).shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert dict(abstract(data=1, fsdp=-1).shape)["fsdp"] == 8


@pytest.mark.parametrize(
    ("sizes", "path", "shape", "expected"),
    [
        # Rows of the codebooks: over tensor, or fsdp where tensor is one.
        ({"tensor": 8, "data": 1}, "params/pixel_codebook", (64, 8), (("tensor",), None)),
        ({"fsdp": 8, "data": 1}, "opt_state/1/mu/pixel_codebook", (64, 8), (("fsdp",), None)),
        # The layers of a scanned module come first and stay whole.
        (
            {"fsdp": 2, "tensor": 2},
            "ema/semantic_encoder/blocks/mlp/fc1/kernel",
            (12, 64, 256),
            (None, ("fsdp",), ("tensor",)),
        ),
        # Anything else: the largest dimension that divides.
        ({"fsdp": 4}, "params/conv_in/kernel", (3, 3, 64, 96), (None, None, None, "fsdp")),
        ({"fsdp": 4}, "params/conv_in/kernel", (3, 3, 64, 97), (None, None, "fsdp", None)),
        ({"fsdp": 4}, "params/norm/scale", (64,), ()),  # too small to be worth a gather
        ({"tensor": 2}, "params/mlp/fc1/kernel", (64, 255), (None, None)),  # does not divide
        ({}, "params/conv_in/kernel", (3, 3, 64, 96), ()),
    ],
)
def test_parameters_are_split_by_their_path(sizes, path, shape, expected):
    assert mesh.partition(path, shape, abstract(**sizes)) == PartitionSpec(*expected)


def test_arrays_that_stay_whole_are_listed_largest_first():
    tree = {"norm": np.zeros(3), "conv": {"kernel": np.zeros((3, 3, 5, 7))}, "big": np.zeros(4096)}
    whole = mesh.stayed_whole(tree, abstract(fsdp=2))
    assert whole == [("conv/kernel", 9 * 35 * 8), ("norm", 24)]
    assert mesh.stayed_whole(tree, abstract()) == []
