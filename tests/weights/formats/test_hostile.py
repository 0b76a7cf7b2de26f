"""Small files that ask for more memory or time than there is: refused at once, by name.

One process reads them all, with a limit on its memory: a reader that hangs ends the test.
"""

import json
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
from pickled_tensors import write_zip

from tokenflow_jax.messages import printable

SCRIPT = """
import json, resource, sys, time
from tokenflow_jax.weights.formats.gguf import read_gguf
from tokenflow_jax.weights.formats.pickles import load_numpy_pickle
from tokenflow_jax.weights.formats.torch import open_state_dict
def read_all(path):
    for tensor in open_state_dict(path).values():
        tensor.read()
readers = {"pickle": load_numpy_pickle, "torch": read_all, "gguf": read_gguf}
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**30,) * 2)
for name, reader, path in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        readers[reader](path)
        result = "read", ""
    except BaseException as error:
        result = type(error).__name__, str(error)
    print(json.dumps([name, *result, time.monotonic() - start]), flush=True)
"""


def shared(make, leaf=()):
    """Return 60 levels of containers that hold the level below twice."""
    for _ in range(60):
        leaf = make(leaf)
    return leaf


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def module(body):
    return b"c__torch__\nM\n)\x81}(" + body + b"ub"


def modules():
    """Return a scripted module of 60 levels, each with the one below under two names."""
    found = module(text(b"x") + b"N") + b"q\1"
    for i in range(2, 62):
        found = module(text(b"a") + found + text(b"b") + b"h" + bytes([i - 1])) + b"q" + bytes([i])
    return b"\x80\2" + found + b"."


def tensor(shape, strides):
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
    sizes, steps = (b"".join(b"J" + struct.pack("<i", n) for n in x) for x in (shape, strides))
    body = storage + b"K\4tQK\0(" + sizes + b"t(" + steps + b"t\x89Nt"
    return b"\x80\2}" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"Rs."


def gguf(keys=0, tensors=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


READ = [("pickle", "a huge memo index"), ("pickle", "a huge PUT")]  # which take no memory
A_KEY = struct.pack("<Q", 1) + b"a"
TUPLE = pickle.dumps(shared(lambda x: (x, x)), 2)[2:-1]
PICKLES = {
    "a huge memo index": b"\x80\2}r\0\0\0\x0b.",
    "a huge PUT": b"(lp99999999999\n.",
    "huge bytes": b"\x80\4\x8e" + struct.pack("<Q", 2**36) + b"a.",
    "a huge bytearray": b"\x80\5\x96" + struct.pack("<Q", 2**36) + b"a.",
    "shared lists": pickle.dumps(shared(lambda x: [x, x]), 2),
    "shared dicts": pickle.dumps(shared(lambda x: {"a": x, "b": x}), 2),
    "a key of shared tuples": b"\x80\2}" + TUPLE + b"K\1s.",
    "a set of shared tuples": b"\x80\4\x8f(" + TUPLE + b"\x90.",
    "a deep key": b"\x80\2})" + b"\x85" * 300_000 + b"K\1s.",
    "a deep list": b"\x80\2" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "keys with one hash": b"\x80\2}("
    + b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 60_000)
    )
    + b"u.",
    "a text encoded often": b"\x80\2" + text(b"a" * 10**6) + b"q\0c_codecs\nencode\nq\1"
    + (b"h\1h\0" + text(b"latin1") + b"\x86R") * 5000 + b".",
    "many operations": b"\x80\2(" + b"}" * 5_000_000 + b"t.",
    "many classes": b"\x80\2(" + b"".join(b"ca\n%d\n" % i for i in range(300_000)) + b"t.",
    "a list that holds itself": b"\x80\2]q\0h\0a.",
}  # fmt: skip
TORCH = {
    "shared lists": pickle.dumps({"model": shared(lambda x: [x, x])}, 2),
    "shared dicts": pickle.dumps(shared(lambda x: {"a": x, "b": x}), 2),
    "shared modules": modules(),
    "a stride of 0": tensor((2**31 - 1, 2**31 - 1), (0, 0)),
    "overlapping rows": tensor((2, 2**30), (1, 0)),
    "an empty tensor of impossible size": tensor((0, *[2**31 - 1] * 4), (1, *[1] * 4)),
    "a tensor of many axes": tensor([1] * 100, [1] * 100),
}
GGUF = {
    "2^60 tensors": gguf(tensors=2**60, body=b"\0" * 999),
    "2^60 keys": gguf(keys=2**60, body=b"\0" * 999),
    "many axes": gguf(tensors=1, body=A_KEY + struct.pack("<I", 200_000) + b"\xff" * 1_600_000),
    "nested arrays": gguf(
        keys=1, body=A_KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50_000
    ),
    "2^40 values": gguf(keys=1, body=A_KEY + struct.pack("<IIQ", 9, 0, 2**40) + bytes(99)),
    "a long text": gguf(keys=1, body=A_KEY + struct.pack("<IQ", 8, 2**63) + bytes(99)),
    "2^62 weights": gguf(
        tensors=1, body=A_KEY + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0) + bytes(99)
    ),
    "an empty tensor of impossible size": gguf(
        tensors=1, body=A_KEY + struct.pack("<IQQIQ", 2, 0, 2**63, 0, 0) + bytes(99)
    ),
}
CASES = [
    *(("pickle", name) for name in PICKLES),
    *(("torch", name) for name in [*TORCH, "deflated pickle", "deflated storage"]),
    *(("gguf", name) for name in GGUF),
    ("torch", "safetensors of many axes"),
    ("torch", "an empty safetensors tensor of impossible size"),
]


def write_safetensors(path, shape, end):
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))


@pytest.fixture(name="results", scope="module")
def _results(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("hostile"), {}
    for number, case in enumerate(CASES):
        reader, name = case
        path = paths[case] = folder / f"file{number}"
        if reader == "pickle":
            path.write_bytes(PICKLES[name])
        elif reader == "gguf":
            path.write_bytes(GGUF[name])
        elif name in TORCH:
            write_zip(path, TORCH[name])
        elif name == "deflated pickle":
            pickled = b"\x80\2" + b"]0" * 200_000_000 + b"N."
            write_zip(path, pickled, compression=zipfile.ZIP_DEFLATED)
        elif name == "deflated storage":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a/data.pkl", tensor((4,), (1,)))
                archive.writestr("a/data/0", bytes(16), zipfile.ZIP_DEFLATED)
        elif "axes" in name:
            write_safetensors(path, [1] * 100, 1)
        else:
            write_safetensors(path, [0, 2**62, 2**62], 0)
    jobs = [(name, reader, str(path)) for (reader, name), path in paths.items()]
    worker = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], stdout=subprocess.PIPE, text=True
    )
    try:
        out, _ = worker.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        worker.kill()
        out, _ = worker.communicate()
    found = [json.loads(line) for line in out.splitlines()]
    return {case: (*line[1:], paths[case]) for case, line in zip(CASES, found, strict=False)}


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_it_is_refused_at_once_by_name(results, case):
    kind, error, seconds, path = results[case]
    if case in READ:
        assert kind == "read" and seconds < 10
        return
    assert kind in ("ValueError", "UnsafeCheckpoint"), error[:500]
    assert str(path) in error and len(error) < 1000 and printable(error) == error
    assert "MemoryError" not in error and seconds < 10
