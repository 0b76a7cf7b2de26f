"""Parts of tensors: the same as parts of the whole, and not more of a file than holds them."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenflow_jax.parallel import mesh
from tokenflow_jax.train.checkpoint_info import CheckpointError
from tokenflow_jax.weights import lazy
from tokenflow_jax.weights.formats import orbax, torch_zip
from tokenflow_jax.weights.formats.gguf import read_gguf
from tokenflow_jax.weights.formats.safetensors import read_safetensors, write_safetensors

STATE = {
    "matrix": np.arange(64 * 96, dtype=np.float32).reshape(64, 96),
    "cube": np.arange(2 * 32 * 64, dtype=np.float32).reshape(2, 32, 64),
    "vector": np.arange(256, dtype=np.float32),
    "number": np.float32(3.0)[()],
    "empty": np.zeros((0, 4), np.float32),
}
INDICES = {
    "matrix": [np.s_[8:24, :], np.s_[:, 32:48], np.s_[60:64, 95:96], np.s_[3:3, :]],
    "cube": [np.s_[1:2, :, :], np.s_[:, 16:32, :], np.s_[:, 1:3, 32:64], np.s_[0:1, 31:32, 0:1]],
    "vector": [np.s_[3:7,], np.s_[:,], np.s_[255:256,]],
    "number": [()],
    "empty": [np.s_[:, 1:2]],
}


def in_safetensors(folder):
    write_safetensors(folder / "x.safetensors", STATE)
    return read_safetensors(str(folder / "x.safetensors"))


def in_torch(folder):
    torch_zip.write_torch_zip(folder / "x.pt", {"model": STATE})
    return torch_zip.read_zip(str(folder / "x.pt"))["model"]


def in_orbax(folder):
    arrays = {f"params/{name}": lazy.in_memory(name, STATE[name]) for name in ("matrix", "cube")}
    orbax.save_weights(folder / "x", arrays, {}, {})
    found = orbax.open_checkpoint(folder / "x")[1]
    return {name.removeprefix("params/"): tensor for name, tensor in found.items()}


def in_gguf(folder, kind=gguf.GGMLQuantizationType.Q8_0):
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    for name in ("matrix", "cube", "vector"):
        writer.add_tensor(name, gguf.quantize(STATE[name], kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(folder / "x.gguf")[1]


@pytest.mark.parametrize("write", [in_safetensors, in_torch, in_orbax, in_gguf])
def test_a_part_is_that_of_the_whole(write, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "_PIECE_BYTES", 1000)  # a few rows
    tensors = write(tmp_path)
    assert {"matrix", "cube"} <= tensors.keys()
    for name, tensor in tensors.items():
        array = tensor.read()
        for index in INDICES[name]:
            part = tensor[index]
            np.testing.assert_array_equal(part, array[index], err_msg=f"{name} {index}")
            assert part.shape == array[index].shape and part.dtype == array.dtype


def test_a_part_without_a_reader_of_its_own_does_not_keep_the_whole():
    tensor = lazy.LazyTensor("x", (4, 6), np.dtype(np.float32), lambda: np.ones((4, 6), np.float32))
    part = tensor[1:2, :]
    assert part.base is None and part.shape == (1, 6)


def test_rows_that_do_not_hold_the_part_are_not_read(tmp_path, monkeypatch):
    tensors = in_safetensors(tmp_path)
    ranges = []
    read = lazy.read_block

    def counted(path, start, size):
        ranges.append(size)
        return read(path, start, size)

    monkeypatch.setattr(lazy, "read_block", counted)
    assert tensors["matrix"][8:24, 0:3].shape == (16, 3)
    assert sum(ranges) == 16 * 96 * 4


def test_a_flipped_byte_is_noticed_where_parts_are_read(tmp_path):
    """The sum of a checkpoint's array is that of the array as saved, before a conversion."""
    tensor = in_orbax(tmp_path)["matrix"]
    where = NamedSharding(mesh.make_mesh({"data": 1}, jax.devices()[:1]), PartitionSpec())
    placed = mesh.place(tensor, where, jnp.bfloat16)
    np.testing.assert_array_equal(placed, STATE["matrix"].astype(jnp.bfloat16))
    changed = STATE["matrix"].copy()
    changed[5, 7] = np.nextafter(changed[5, 7], np.float32(0))
    damaged = dataclasses.replace(tensor, read_part=lambda index: changed[index])
    with pytest.raises(CheckpointError, match=r"damaged on disk(.|\n)*matrix"):
        mesh.place(damaged, where, jnp.bfloat16)
