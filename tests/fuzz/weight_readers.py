"""Readers of weights, configs, checkpoints and statistics."""

import functools
import json
import pathlib
import pickle
import struct

import jax
import ml_dtypes
import numpy as np

from tests.fuzz.readers import Files, Reader, collect
from tests.helpers.tiny import TINY, random_params
from tokenflow_jax.evals import fid_network
from tokenflow_jax.evals.frechet import Statistics
from tokenflow_jax.nets import lpips as lpips_net
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.teacher import load_shipped, save_shipped
from tokenflow_jax.train import checkpoint_info
from tokenflow_jax.understanding.folder import read_understanding_config
from tokenflow_jax.weights import language_model
from tokenflow_jax.weights.card import UNKNOWN, Trained
from tokenflow_jax.weights.conversion import is_torch, open_source
from tokenflow_jax.weights.formats import orbax
from tokenflow_jax.weights.formats.gguf import read_gguf
from tokenflow_jax.weights.formats.pickles import load_numpy_pickle
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import find_weights, open_state_dict, open_state_dicts
from tokenflow_jax.weights.formats.torch_zip import write_torch_zip
from tokenflow_jax.weights.lazy import in_memory
from tokenflow_jax.weights.names import lpips
from tokenflow_jax.weights.names.decoder import gguf_config_fields, gguf_tensors
from tokenflow_jax.weights.pretrained import save_folder

_MOST_READ = 2**28  # bytes of tensors of one input
STATE = {
    "w": np.arange(24, dtype=np.float32).reshape(4, 6),
    "half": np.array([1.5, 2.5], np.float16),
    "brain": np.array([[1.5], [-3.0]], ml_dtypes.bfloat16),
    "count": np.array(7),
    "none": np.zeros((0, 3), np.float32),
}


def _read_all(tensors) -> None:
    left = _MOST_READ
    for tensor in tensors.values():
        left -= tensor.nbytes
        if left >= 0:
            array = tensor.read()
            assert array.shape == tuple(tensor.shape) and array.dtype == tensor.dtype


def _read_state_dicts(path: pathlib.Path) -> None:
    assert is_torch(path)
    found = open_state_dicts(path)
    find_weights(found)
    for state in found.values():
        _read_all(state)
    open_state_dict(path)


def _safetensors(folder: pathlib.Path) -> list[Files]:
    write_safetensors(folder / "m.safetensors", STATE)
    return [collect(folder)]


def _pretrained(folder: pathlib.Path) -> list[Files]:
    rows = {"n": 1}
    save_folder(folder / "m", PART, TINY, random_params(TINY, 0), {"data": {}}, rows, UNKNOWN)
    (folder / "m" / "README.md").unlink()
    return [collect(folder / "m")]


def _read_pretrained(folder: pathlib.Path) -> None:
    for path in (folder, folder / "model.safetensors"):
        source = open_source(path, PART)
        Trained(str(path), None, source.weights, source.saved).facts()


def _torch(folder: pathlib.Path) -> list[Files]:
    ema = {name: array for name, array in STATE.items() if name != "w"}
    write_torch_zip(folder / "m.pt", {"model": STATE, "ema": ema})
    return [collect(folder)]


def _jit(folder: pathlib.Path) -> list[Files]:
    import zipfile

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def tensor(key):
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
            + b"K\x06tQK\0K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip

    def module(name, content):
        return f"c__torch__\n{name}\n".encode() + b")\x81}(" + content + b"ub"

    inner = module("Inner", text("weight") + tensor("0") + text("bias") + tensor("1"))
    outer = module("Outer", text("training") + b"\x88" + text("layer") + inner + b"q\x01")
    with zipfile.ZipFile(folder / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + outer + b".")
        for key in "01":
            archive.writestr(f"m/data/{key}", np.ones(6, np.float32).tobytes())
        archive.writestr("m/byteorder", b"little")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    return [collect(folder)]


def _pickle(folder: pathlib.Path) -> list[Files]:
    tree = {"a": {"w": STATE["w"], "t": STATE["w"].T}, "b": [np.float32(0.5), np.array(2, ">i4")]}
    return [{"m.ckpt": pickle.dumps(tree, protocol)} for protocol in (2, 3, 4, 5)]


def _gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(folder: pathlib.Path) -> list[Files]:
    numbers = {"block_count": 2, "embedding_length": 8, "feed_forward_length": 16}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 9}
    head = [_gguf_text("general.architecture") + struct.pack("<I", 8) + _gguf_text("llama")]
    head += [_gguf_text(f"llama.{n}") + struct.pack("<II", 4, v) for n, v in numbers.items()]
    head += [_gguf_text("general.alignment") + struct.pack("<II", 4, 32)]
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    head += [_gguf_text(epsilon) + struct.pack("<If", 6, 1e-5)]
    tokens = struct.pack("<IIQ", 9, 8, 9) + b"".join(_gguf_text(c) for c in "abcdefghi")
    head += [_gguf_text("tokenizer.ggml.tokens") + tokens]
    tensors = {"token_embd.weight": (9, 8, 0), "blk.0.attn_q.weight": (8, 8, 1)}
    tensors |= {"blk.1.ffn_up.weight": (2, 32, 8), "output_norm.weight": (1, 32, 2)}
    entries, body = [], b""
    for name, (rows, columns, kind) in tensors.items():
        entries.append(_gguf_text(name) + struct.pack("<IQQIQ", 2, columns, rows, kind, len(body)))
        sizes = {0: 4 * columns, 1: 2 * columns, 8: 34 * columns // 32, 2: 18 * columns // 32}
        body += b"\x01" * (rows * sizes[kind])
        body += bytes(-len(body) % 32)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(head)) + b"".join(head + entries)
    return [{"m.gguf": start + bytes(-len(start) % 32) + body}]


def _read_gguf(folder: pathlib.Path) -> None:
    path = folder / "m.gguf"
    fields, tensors = read_gguf(path)
    _read_all(tensors)
    config = language_model.config_from_json(gguf_config_fields(fields, tied=True), str(path))
    gguf_tensors(tensors, config)


def _shards(folder: pathlib.Path) -> list[Files]:
    names = list(STATE)
    for file, part in {"a.safetensors": names[:2], "b.safetensors": names[2:]}.items():
        write_safetensors(folder / file, {name: STATE[name] for name in part})
    index = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    weight_map = {name: file for file, part in index.items() for name in part}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "m.safetensors.index.json").write_text(text)
    return [collect(folder)]


def _config(folder: pathlib.Path) -> list[Files]:
    fields = {
        "model_type": "qwen2", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "rope_theta": 1e6, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": True, "use_sliding_window": False, "head_dim": 8,
        "mm_hidden_size": 40, "mm_projector_type": "mlp2x_gelu",
    }  # fmt: skip
    new = {**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return [{"config.json": json.dumps(f).encode()} for f in (fields, new)]


def _read_config(folder: pathlib.Path) -> None:
    language_model.language_model_table(language_model.read_config(folder))
    read_understanding_config(folder)


def _checkpoint(folder: pathlib.Path) -> list[Files]:
    arrays = {f"params/a/{name}": in_memory(name, STATE[name]) for name in ("w", "half", "brain")}
    about = {"model": {"width": 3}, "stage": "tokenizer"}
    orbax.save_weights(folder / "c", arrays, about, {"weights": "raw"})
    return [collect(folder)]


def _read_checkpoint(folder: pathlib.Path) -> None:
    checkpoint_info.read_info(checkpoint_info.find_checkpoint(folder / "c"))
    _read_all(orbax.open_checkpoint(folder / "c")[1])


_ABOUT = {"fingerprint": "1-00", "inception_sha256": "00"}


def _fid(folder: pathlib.Path) -> list[Files]:
    statistics = Statistics(3, np.ones(4), np.eye(4))
    fid_network.write_statistics(folder / "fid.npz", statistics, _ABOUT | {"images": "x"})
    return [collect(folder)]


def _teacher(folder: pathlib.Path) -> list[Files]:
    about = {"vit": {"width": 8, "depth": 1}, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_shipped(folder / "t.safetensors", {"a": {"b": np.ones((2, 3))}}, about)
    return [collect(folder)]


@functools.cache
def _narrow_lpips():
    lpips_net.STAGES = tuple((channels // 64, count) for channels, count in lpips_net.STAGES)
    template = lpips_net.lpips_template()
    lpips.lpips_template = lambda: template
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), template)


def _lpips(folder: pathlib.Path) -> list[Files]:
    params = _narrow_lpips()
    tree = {"VGG16_0": {f"Conv_{i}": dict(params[f"conv_{i}"]) for i in range(13)}}
    for i in range(5):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": params[f"head_{i}"].reshape(1, 1, -1, 1)}}
    return [{"vgg16.ckpt": pickle.dumps(tree, protocol)} for protocol in (2, 4)]


READERS = {
    "safetensors": Reader(
        _safetensors,
        lambda folder: _read_state_dicts(folder / "m.safetensors"),
        {".safetensors": "safetensors"},
    ),
    "pretrained": Reader(
        _pretrained, _read_pretrained, {".json": "json", ".safetensors": "safetensors"}
    ),
    "torch": Reader(_torch, lambda folder: _read_state_dicts(folder / "m.pt"), {".pt": "zip"}),
    "jit": Reader(_jit, lambda folder: _read_state_dicts(folder / "m.pt"), {".pt": "zip"}),
    "pickle": Reader(
        _pickle, lambda folder: load_numpy_pickle(folder / "m.ckpt"), {".ckpt": "pickle"}
    ),
    "gguf": Reader(_gguf, _read_gguf),
    "shards": Reader(_shards, _read_state_dicts, {".json": "json", ".safetensors": "safetensors"}),
    "config": Reader(_config, _read_config, {".json": "json"}),
    "checkpoint": Reader(
        _checkpoint, _read_checkpoint, {"info/metadata": "json", "_METADATA": "json"}
    ),
    "fid": Reader(
        _fid,
        lambda folder: fid_network.read_statistics(folder / "fid.npz", _ABOUT),
        {".npz": "zip"},
    ),
    "teacher": Reader(
        _teacher,
        lambda folder: load_shipped(folder / "t.safetensors"),
        {".safetensors": "safetensors"},
    ),
    "lpips": Reader(
        _lpips, lambda folder: lpips.load_lpips(folder / "vgg16.ckpt"), {".ckpt": "pickle"}
    ),
}
