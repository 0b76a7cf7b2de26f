"""Files as torch.save writes them, around any nested dicts, without torch."""

import io
import pickle
import zipfile

import numpy as np


def _named(module, name):
    function = lambda *_: None  # noqa: E731
    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


class _Storage:
    def __init__(self, key, numel):
        self.key, self.numel = key, numel


class _Tensor:
    def __init__(self, key, array):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        self.arguments = (_Storage(key, array.size), 0, array.shape, strides, False, {})

    def __reduce__(self):
        return _named("torch._utils", "_rebuild_tensor_v2"), self.arguments


class _Pickler(pickle._Pickler):  # the Python one, which writes any global unchecked
    def persistent_id(self, value):
        if isinstance(value, _Storage):
            return "storage", _named("torch", "FloatStorage"), str(value.key), "cpu", value.numel
        return None

    def save(self, value, *args, **kwargs):
        if getattr(value, "__module__", "").startswith("torch"):
            self.write(f"c{value.__module__}\n{value.__name__}\n".encode())
        else:
            super().save(value, *args, **kwargs)


def write_torch(path, tree):
    """Write nested dicts of float32 arrays and plain values; return the path."""
    arrays = []

    def described(value):
        if isinstance(value, dict):
            return {key: described(item) for key, item in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        arrays.append(np.ascontiguousarray(value, np.float32))
        return _Tensor(len(arrays) - 1, arrays[-1])

    out = io.BytesIO()
    _Pickler(out, 2).dump(described(tree))
    return write_zip(path, out.getvalue(), [array.tobytes() for array in arrays])


def write_zip(path, pickled, storages=(b"\0" * 16,), compression=zipfile.ZIP_STORED):
    """Write a file as torch.save does, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled, compression)
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
    return path
