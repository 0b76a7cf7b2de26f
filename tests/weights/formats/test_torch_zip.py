"""`.pt` files for torch.load, compared with torch's own."""

import collections
import io
import pathlib
import pickle
import pickletools
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.formats.torch_zip import write_torch_zip
from tokenflow_jax.weights.lazy import LazyTensor

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
STATE = {
    "matrix": np.arange(24, dtype=np.float32).reshape(4, 6),
    "turned": np.arange(24, dtype=np.float32).reshape(4, 6).T,
    "long": np.arange(2**21, dtype=np.float32).reshape(-1, 2).T,  # more than one piece
    "half": np.array([1.5, 2.5], np.float16),
    "brain": np.array([[1.5], [-3.0]], ml_dtypes.bfloat16),
    "count": np.array(2**40),
    "boolean": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def calls(path):
    """Return the calls that a file asks torch.load to make, with storages by content."""

    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            if name == "OrderedDict":
                return collections.OrderedDict
            return lambda *arguments: (f"{module}.{name}", arguments)

        def persistent_load(self, pid):
            kind, element, key, device, count = pid
            return kind, element(), device, count, archive.read(root.replace(".pkl", f"/{key}"))

    with zipfile.ZipFile(path) as archive:
        (root,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return Recorder(io.BytesIO(archive.read(root))).load()


def test_calls_equal_those_of_torch(tmp_path):
    names = ("base", "bfloat16", "float16", "float64", "int64", "boolean", "complex64")
    state, theirs = open_state_dict(GOLDEN / "torch_bare.pt"), calls(GOLDEN / "torch_bare.pt")
    write_torch_zip(tmp_path / "ours.pt", {"model": {name: state[name] for name in names}})
    assert calls(tmp_path / "ours.pt") == {"model": {name: theirs[name] for name in names}}


def test_round_trip_of_all_types_and_strides(tmp_path):
    path = tmp_path / "model.pt"
    write_torch_zip(path, {"model": STATE, "ema": {"matrix": STATE["matrix"] + 1}})
    state = open_state_dict(path)
    assert list(state) == list(STATE)
    for name, array in STATE.items():
        read = state[name].read()
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes(), name
    np.testing.assert_array_equal(
        open_state_dict(path, "ema")["matrix"].read(), STATE["matrix"] + 1
    )


def test_layout_equals_that_of_torch(tmp_path):
    path = tmp_path / "model.pt"
    write_torch_zip(path, {"model": STATE})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        opcodes = {op.name for op, _, _ in pickletools.genops(archive.read("archive/data.pkl"))}
        assert opcodes <= {  # those of torch's weights_only reader
            "PROTO", "EMPTY_DICT", "MARK", "BINUNICODE", "GLOBAL", "EMPTY_TUPLE", "REDUCE",
            "BININT", "LONG1", "TUPLE", "NEWFALSE", "BINPERSID", "SETITEMS", "STOP",
        }  # fmt: skip
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
    raw = path.read_bytes()
    for info in archive.infolist():
        if "/data/" in info.filename:
            lengths = np.frombuffer(raw, "<u2", 2, info.header_offset + 26).tolist()
            assert (info.header_offset + 30 + sum(lengths)) % 64 == 0


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def read(value):
        alive[:] = [ref for ref in alive if ref() is not None]
        assert not alive
        array = np.full((3, 5), value, np.float32)
        alive.append(weakref.ref(array))
        return array

    lazy = {
        str(i): LazyTensor(str(i), (3, 5), np.dtype(np.float32), lambda i=i: read(i))
        for i in range(4)
    }
    write_torch_zip(tmp_path / "model.pt", {"model": lazy})
    state = open_state_dict(tmp_path / "model.pt")
    assert [state[name].read()[0, 0] for name in state] == [0, 1, 2, 3]


def test_types_without_a_storage_are_listed(tmp_path):
    state = {"a": np.zeros(1, np.uint16), "b": np.zeros(1), "c": np.zeros(1, np.uint64)}
    with pytest.raises(ValueError, match=r"(?s)model/a: uint16.*model/c: uint64"):
        write_torch_zip(tmp_path / "model.pt", {"model": state})
