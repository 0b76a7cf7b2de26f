"""Readers of PyTorch files: contents, and refusal of hostile or damaged files."""

import io
import json
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tokenflow_jax.weights.formats.pickles import UnsafeCheckpoint, load_numpy_pickle
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import open_state_dict

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_reads_every_kind_of_tensor():
    state = open_state_dict(GOLDEN / "torch_bare.pt")
    expected = {
        "base": BASE,
        "transposed": BASE.T,
        "part": BASE[1:3, 2:5],
        "expanded": np.zeros((3, 2), np.float32),
        "bfloat16": np.array([1.5, -2.0, 3.140625], ml_dtypes.bfloat16),
        "float16": np.array([[0.5], [-65504.0]], np.float16),
        "float64": np.array(1 / 3),
        "int64": np.array(2**40),
        "uint16": np.array([65535, 7], np.uint16),
        "boolean": np.array([True, False, True]),
        "complex64": np.array([1 + 2j], np.complex64),
        "empty": np.zeros((0, 5), np.float32),
        "parameter": np.array([-1.0], np.float32),
    }
    assert list(state) == list(expected)
    for name, array in expected.items():
        assert state[name].shape == array.shape and state[name].dtype == array.dtype, name
        read = state[name].read()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array, err_msg=name)
        assert not np.shares_memory(read, state[name].read()) or not read.size


@pytest.mark.parametrize(("key", "offset"), [(None, 0), ("model", 0), ("ema", 0.5)])
def test_training_checkpoint_with_optimizer_and_namespace(key, offset):
    state = open_state_dict(GOLDEN / "torch_training.pt", key)
    assert set(state) == {"weight", "bias"}
    np.testing.assert_array_equal(state["weight"].read(), np.arange(6).reshape(2, 3) + offset)
    np.testing.assert_array_equal(state["bias"].read(), np.array([7, 8]) + offset)


def test_unknown_key_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'discriminator'; there are \['ema', 'model'\]"):
        open_state_dict(GOLDEN / "torch_training.pt", "discriminator")


def test_scripted_module():
    state = open_state_dict(GOLDEN / "torch_script.pt")
    assert {"0.weight", "0.bias", "1.running_var", "1.num_batches_tracked"} <= set(state)
    np.testing.assert_array_equal(state["0.weight"].read(), [[1, 2], [3, 4]])


def test_old_format_names_the_remedy():
    with pytest.raises(ValueError, match=r"before version 1\.6.*torch.save"):
        open_state_dict(GOLDEN / "torch_legacy.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x00" * 64])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt"):
        open_state_dict(path)


def test_truncated_zip_is_refused(tmp_path):
    path = tmp_path / "cut.pt"
    path.write_bytes((GOLDEN / "torch_bare.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        open_state_dict(path)


# --- hostile pickles ------------------------------------------------------------------------------


def zip_of(path, pickled, data=b"\x00" * 16):
    """Write a file as torch.save does, around any pickle, with one storage named 0."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return path


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w').close()",), "builtins.eval"),
        (os.mkdir, ("{}",), "posix.mkdir"),
        (pathlib.Path.touch, ("{}",), "builtins.getattr|pathlib.*touch"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {}, "args": [x]}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_are_refused_and_nothing_runs(tmp_path, function, arguments, name, wrap, protocol):
    victim = tmp_path / "ran"
    arguments = [argument.format(str(victim)) for argument in arguments]
    pickled = pickle.dumps(wrap(Call(function, *arguments)), protocol)
    for path in (zip_of(tmp_path / "evil.pt", pickled), tmp_path / "evil.ckpt"):
        if path.suffix == ".ckpt":
            path.write_bytes(pickled)
            reader = load_numpy_pickle
        else:
            reader = open_state_dict
        with pytest.raises(UnsafeCheckpoint, match=f"evil.*({name})"):
            reader(path)
    assert not victim.exists()
    pickle.loads(pickled)  # the same bytes do act where pickle is trusted
    assert victim.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        # Sets an attribute of a stand-in class, to get it called; of a rebuilder; of OrderedDict.
        b"\x80\x02cos\nsystem\nN}X\x06\x00\x00\x00originX\x12\x00\x00\x00argparse.Namespaces\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x09\x00\x00\x00_functioncos\nsystem\ns\x86b.",
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00acos\nsystem\ns\x86b.",
        # Calls what NEWOBJ made; a class through INST and OBJ; an extension code.
        b"\x80\x02cos\nsystem\n)\x81)R.",
        b"(X\x02\x00\x00\x00idios\nsystem\n.",
        b"(cos\nsystem\nX\x02\x00\x00\x00ido.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    ],
)
def test_crafted_opcodes_are_refused(tmp_path, pickled):
    with pytest.raises(ValueError, match=r"evil\.pt"):
        open_state_dict(zip_of(tmp_path / "evil.pt", pickled))


def tensor_pickle(numel, offset, shape, strides, state=None, element=None):
    """Pickle {"w": float32 tensor over storage 0} with any numbers, without torch.

    `state` is applied to the finished tensor; `element` reads the storage as another type.
    """

    class Tensor:
        def __reduce__(self):
            function, arguments = "_rebuild_tensor_v2", (Storage(), offset, shape, strides, 0, None)
            if element:
                function, arguments = "_rebuild_tensor_v3", (*arguments, _global("torch", element))
            return _global("torch._utils", function), arguments, state

    class Storage:
        pass

    def _global(module, name):
        function = lambda *_: None  # noqa: E731
        function.__module__, function.__qualname__, function.__name__ = module, name, name
        return function

    class Pickler(pickle._Pickler):  # the Python one, which writes any global unchecked
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", _global("torch", "FloatStorage"), "0", "cpu", numel)
            return None

        def save(self, value, *args, **kwargs):
            if getattr(value, "__module__", "").startswith("torch"):
                self.write(f"c{value.__module__}\n{value.__name__}\n".encode())
            else:
                super().save(value, *args, **kwargs)

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Tensor()})
    return out.getvalue()


def test_handmade_tensors_are_read(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    path = zip_of(tmp_path / "w.pt", tensor_pickle(4, 1, (3,), (1,)), data)
    np.testing.assert_array_equal(open_state_dict(path)["w"].read(), [1, 2, 3])
    path = zip_of(tmp_path / "v.pt", tensor_pickle(4, 0, (2,), (1,), element="int64"), data)
    np.testing.assert_array_equal(open_state_dict(path)["w"].read(), np.frombuffer(data, np.int64))


@pytest.mark.parametrize(
    ("numel", "shape", "options"),
    [
        (4, (4,), {"element": "float64"}),  # twice as long as the storage
        (4, (4,), {"state": (("archive/data/0", None, 10**9), 0, (10**8,), (1,), "f4")}),
        (4, (4,), {"state": {"shape": (10**8,)}}),
        (4, (4,), {"state": (None, {"shape": (10**8,)})}),  # changes a checked tensor
    ],
)
def test_checked_tensors_cannot_be_stretched(tmp_path, numel, shape, options):
    path = zip_of(tmp_path / "w.pt", tensor_pickle(numel, 0, shape, (1,), **options))
    with pytest.raises(ValueError, match=r"w\.pt"):
        open_state_dict(path)


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [
        (4, 1, (4,), (1,)),  # one element too far
        (4, 0, (2, 2), (3, 1)),  # rows too far apart
        (4, 5, (), ()),  # starts behind the end
        (4, -1, (2,), (1,)),
        (4, 3, (2,), (-1,)),
        (4, 0, (2, 2), (1,)),
        (400, 0, (400,), (1,)),  # longer than the data
        (4, 0, ("4",), (1,)),
    ],
)
def test_tensors_cannot_leave_their_storage(tmp_path, numel, offset, shape, strides):
    path = zip_of(tmp_path / "w.pt", tensor_pickle(numel, offset, shape, strides))
    with pytest.raises(ValueError, match=r"w\.pt"):
        open_state_dict(path)


# --- NumPy pickles --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_pickle(tmp_path, protocol):
    tree = {
        "a": {"kernel": BASE, "bias": BASE[:, 1], "turned": np.asfortranarray(BASE)},
        "b": [np.int64(3), np.float32(0.5), np.array(2, ">i4"), np.zeros((0, 2))],
    }
    path = tmp_path / "tree.ckpt"
    path.write_bytes(pickle.dumps(tree, protocol))
    read = load_numpy_pickle(path)
    for name, array in tree["a"].items():
        assert read["a"][name].dtype == array.dtype
        np.testing.assert_array_equal(read["a"][name], array)
    assert read["b"][:3] == [3, 0.5, 2] and read["b"][3].shape == (0, 2)


def test_numpy_objects_are_refused(tmp_path):
    path = tmp_path / "objects.ckpt"
    path.write_bytes(pickle.dumps(np.array([print, "x"], object)))
    with pytest.raises(ValueError, match=r"objects\.ckpt"):
        load_numpy_pickle(path)


# --- safetensors and shards -----------------------------------------------------------------------

STATE = {
    "w": BASE,
    "half": np.array([1.5, 2.5], np.float16),
    "brain": np.array([[1.5], [-3.0]], ml_dtypes.bfloat16),
    "count": np.array(7),
    "none": np.zeros((0, 3), np.float32),
}


def assert_same(state, expected):
    assert set(state) == set(expected)
    for name, array in expected.items():
        read = state[name].read()
        assert read.dtype == array.dtype and read.shape == array.shape
        np.testing.assert_array_equal(read, array)


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, STATE)
    assert_same(open_state_dict(path), STATE)
    assert_same(open_state_dict(tmp_path), STATE)


def test_safetensors_package_reads_our_files_and_we_read_its_files(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    state = {name: array for name, array in STATE.items() if name != "brain"}
    write_safetensors(tmp_path / "ours.safetensors", state)
    theirs = package.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(theirs[name], state[name])
    package.save_file(state, tmp_path / "theirs.safetensors")
    assert_same(open_state_dict(tmp_path / "theirs.safetensors"), state)


def test_shards_through_index_or_folder(tmp_path):
    names = list(STATE)
    parts = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in parts.items():
        write_safetensors(tmp_path / file, {name: STATE[name] for name in part})
    assert_same(open_state_dict(tmp_path), STATE)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(open_state_dict(index), STATE)
    assert_same(open_state_dict(tmp_path), STATE)

    index.write_text(json.dumps({"weight_map": weight_map | {"lost": "b.safetensors"}}))
    with pytest.raises(ValueError, match="lost"):
        open_state_dict(index)
    away = {"x": "c.safetensors", "y": "../a.safetensors", "z": "d.safetensors"}
    index.write_text(json.dumps({"weight_map": away}))
    with pytest.raises(ValueError, match=r"(?s)\.\./a.*c\.safetensors.*d\.safetensors"):
        open_state_dict(index)


def test_the_same_name_in_two_shards_is_refused(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / file, {"w": BASE})
    with pytest.raises(ValueError, match=r"(?s)more than one file.*w"):
        open_state_dict(tmp_path)


def test_wrapper_prefixes_are_removed(tmp_path):
    write_safetensors(
        tmp_path / "m.safetensors", {f"module._orig_mod.{n}": STATE[n] for n in STATE}
    )
    state = open_state_dict(tmp_path / "m.safetensors")
    assert_same(state, STATE)
    assert state.prefix == "module._orig_mod."


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

NEXT = GOOD | {"data_offsets": [4, 8]}
TWICE = f'{{"twice": {json.dumps(GOOD)}, "twice": {json.dumps(NEXT)}}}'


def write_raw(path, header, data=b"\x00" * 4):
    """Write a .safetensors file with any header: a dict, or its text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_good_safetensors_header_is_read(tmp_path):
    """The damaged headers below differ from this one in one respect each."""
    write_raw(tmp_path / "good.safetensors", {"good": GOOD})
    np.testing.assert_array_equal(open_state_dict(tmp_path / "good.safetensors")["good"].read(), 0)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"good": GOOD, "long": GOOD | {"shape": [2], "data_offsets": [4, 12]}}, b"\x00" * 8),
        ({"odd": GOOD | {"shape": [2]}}, b"\x00" * 4),
        ({"good": GOOD, "overlap": GOOD}, b"\x00" * 4),
        ({"good": GOOD, "hole": GOOD | {"data_offsets": [8, 12]}}, b"\x00" * 12),
        ({"negative": GOOD | {"shape": [-1]}}, b"\x00" * 4),
        ({"unknown": GOOD | {"dtype": "F5"}}, b"\x00" * 4),
        ({"good": GOOD}, b"\x00" * 5),  # trailing bytes
        ({"good": GOOD}, b"\x00" * 3),
        (TWICE, b"\x00" * 8),
        ("[]", b""),
        ("{", b""),
    ],
)
def test_damaged_safetensors_is_refused(tmp_path, header, data):
    write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=r"bad\.safetensors: damaged .*fetch it again"):
        open_state_dict(tmp_path / "bad.safetensors")


def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"bad\.safetensors: damaged .*header"):
        open_state_dict(tmp_path / "bad.safetensors")


def test_unknown_types_in_safetensors_are_all_listed(tmp_path):
    """Types that the package knows and NumPy does not."""
    byte = {"dtype": "F8_E8M0", "shape": [2]}
    header = {name: byte | {"data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate("ab")}
    write_raw(tmp_path / "new.safetensors", header)
    with pytest.raises(ValueError, match=r"(?s)new\.safetensors.*a: F8_E8M0.*b: F8_E8M0"):
        open_state_dict(tmp_path / "new.safetensors")
