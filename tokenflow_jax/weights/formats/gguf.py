"""GGUF files of Llama and Qwen2 models: weights (dequantised), config, and the text tokenizer.

    config, params = load_language_model("SmolLM2-135M-Instruct.Q4_1.gguf")
    to_folder("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")      in Hugging Face's format

Nothing but NumPy is needed for weights. The format: a header of keys and values, a table of
tensors, and their data, whose quantised types are blocks of 32 weights with a scale of their own.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.weights import language_model, rules
from tokenflow_jax.weights.lazy import LazyTensor, read_block

_BLOCK = 32


class _Type(NamedTuple):
    """A tensor type: bytes of a block, weights in it, and (blocks, bytes) uint8 to float32."""

    nbytes: int
    count: int
    decode: Callable[[np.ndarray], np.ndarray]


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """One float16 of each block, at byte `start`, as float32 (blocks, 1)."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """The four-bit numbers of the last 16 bytes: all low halves, then all high ones."""
    packed = blocks[:, -_BLOCK // 2 :]
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _plain(dtype: Any) -> _Type:
    size = np.dtype(dtype).itemsize
    return _Type(size, 1, lambda blocks: blocks.reshape(-1).view(dtype).astype(np.float32))


_TYPES: dict[int, _Type] = {
    0: _plain("<f4"),
    1: _plain("<f2"),
    2: _Type(18, _BLOCK, lambda b: _halves(b, 0) * (_nibbles(b) - 8)),  # Q4_0
    3: _Type(20, _BLOCK, lambda b: _halves(b, 0) * _nibbles(b) + _halves(b, 2)),  # Q4_1
    8: _Type(34, _BLOCK, lambda b: _halves(b, 0) * b[:, 2:].view(np.int8)),  # Q8_0
    30: _plain(ml_dtypes.bfloat16),
}
_READABLE = "F32, F16, BF16, Q4_0, Q4_1, Q8_0"
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class _Reader:
    """Reads the header from a position onwards."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a string of {length} bytes")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if count > len(self.data) - self.at:
                raise ValueError(f"an array of {count} values")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown kind {kind}")
        return self.scalar(_SCALARS[kind])


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Opens a GGUF file (version 2 or 3).

    Args:
      path: the file.

    Returns:
      Its keys and values, and its tensors by name as float32, (out, in) for matrices; a tensor is
      read and dequantised when it is needed.

    Raises:
      ValueError: no such file, another format, a damaged file, or tensor types that are not read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    size = os.path.getsize(path)
    if size < 24:
        raise ValueError(f"{path}: not a GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        reader = _Reader(data)
        reader.at = 4
        try:
            version = reader.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"version {version}, of which only 2 and 3 are read")
            count, keys = reader.scalar("Q"), reader.scalar("Q")
            fields = {}
            for _ in range(keys):
                name = reader.string()
                fields[name] = reader.value(reader.scalar("I"))
            entries = [_entry(reader) for _ in range(count)]
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path}: damaged GGUF header ({error}); fetch it again") from None
        alignment = fields.get("general.alignment", _BLOCK)
        start = -(-reader.at // alignment) * alignment
    return fields, _tensors(path, entries, start, size)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """A line of the table: name, shape (rows first), type, offset."""
    name = reader.string()
    shape = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))[::-1]
    return name, shape, reader.scalar("I"), reader.scalar("Q")


def _tensors(path: str, entries: list, start: int, size: int) -> dict[str, LazyTensor]:
    tensors, problems = {}, []
    for name, shape, kind, offset in entries:
        weights = int(np.prod(shape, dtype=object)) if shape else 1
        if kind not in _TYPES:
            problems.append(f"{name}: type {kind} is not read, only {_READABLE}")
            continue
        nbytes = weights // _TYPES[kind].count * _TYPES[kind].nbytes
        if weights % _TYPES[kind].count or start + offset + nbytes > size:
            problems.append(f"{name}: {shape} at byte {start + offset} of {size}; fetch it again")
            continue

        def load(kind=kind, shape=shape, begin=start + offset, nbytes=nbytes) -> np.ndarray:
            blocks = read_block(path, begin, nbytes).reshape(-1, _TYPES[kind].nbytes)
            return _TYPES[kind].decode(blocks).reshape(shape)

        tensors[name] = LazyTensor(name, shape, np.dtype(np.float32), load)
    if problems:
        raise ValueError(f"{path}: unreadable tensors:\n  " + "\n  ".join(problems))
    return tensors


_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_fields(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """A GGUF header's hyper-parameters as those of a Hugging Face config.json.

    Args:
      fields: of `read_gguf`.
      tied: whether the file has no head of its own.
    """
    kind = fields.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    found = {theirs: own[ours] for theirs, ours in _FIELDS.items() if ours in own}
    size = own.get("vocab_size") or len(fields.get("tokenizer.ggml.tokens", ()))
    if size:
        found["vocab_size"] = size
    scaling = own.get("rope.scaling.type", "none")
    if scaling != "none":
        found["rope_scaling"] = {"rope_type": scaling}
    if kind == "llama" and own.get("attention.key_length"):
        found["head_dim"] = own["attention.key_length"]
    return {
        "model_type": kind,
        **found,
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "rope_theta": own.get("rope.freq_base", 10000.0),
        # A float32 in the file: 1e-5 is not 9.999999747378752e-06.
        "rms_norm_eps": float(f"{own.get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "tie_word_embeddings": tied,
    }


def hugging_face_tensors(
    tensors: Mapping[str, LazyTensor], config: LMConfig
) -> dict[str, LazyTensor]:
    """Tensors by Hugging Face's names; names that are not known keep theirs.

    A Llama's query and key rows come back to Hugging Face's order: GGUF interleaves the two halves
    of each head, (0, D / 2, 1, D / 2 + 1, ...), as its rotation pairs neighbours.
    """
    renamed = {}
    for name, tensor in tensors.items():
        *block, part, kind = name.split(".")
        full = f"{_NAMES.get(part, part)}.{kind}"
        if block[:1] == ["blk"]:
            full = f"model.layers.{block[1]}.{full}"
        elif part not in _NAMES:
            full = name
        if part in ("attn_q", "attn_k") and not config.qkv_bias:
            heads = config.heads if part == "attn_q" else config.kv_heads
            tensor = _uninterleaved(tensor, heads)
        renamed[full] = LazyTensor(full, tensor.shape, tensor.dtype, tensor.load)
    return renamed


def _uninterleaved(tensor: LazyTensor, heads: int) -> LazyTensor:
    def load() -> np.ndarray:
        array = tensor.read()
        halves = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return halves.swapaxes(1, 2).reshape(array.shape)

    return LazyTensor(tensor.name, tensor.shape, tensor.dtype, load)


def open_gguf(
    path: str | os.PathLike, config: LMConfig | None = None
) -> tuple[LMConfig, Iterator[tuple[str, np.ndarray]]]:
    """Opens the language model of a GGUF file; see `llama.load_language_model`.

    Args:
      path: the file.
      config: what to expect instead of what the file says.

    Returns:
      The config, and (our path, float32 array) of each parameter, read one after the other.
    """
    fields, tensors = read_gguf(path)
    found = config_fields(fields, tied="output.weight" not in tensors)
    config = config or language_model.config_from_json(found, os.fspath(path))
    state = hugging_face_tensors(tensors, config)
    table, template = (
        language_model.language_model_table(config),
        language_model.language_model_template(config),
    )
    return config, rules.iterate_flax(state, table, template)


# How text is cut before merging, by the name that GGUF gives to it.
_CUTS = ("gpt-2", "smollm")


def text_tokenizer(path: str | os.PathLike) -> Any:
    """The text tokenizer inside a GGUF file, as transformers' PreTrainedTokenizerFast.

    Args:
      path: the file; its vocabulary must be byte-level BPE that cuts text as GPT-2 or SmolLM does.

    Raises:
      ValueError: another kind of vocabulary, or transformers is not installed.
    """
    fields, _ = read_gguf(path)
    kind, cut = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{os.fspath(path)}: a vocabulary of kind {kind!r}, {cut!r}, is not read, only 'gpt2' "
            f"with {' or '.join(map(repr, _CUTS))}; use the model's tokenizer.json"
        )
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise ValueError(
            "text tokenizers need the package transformers: pip install 'tokenflow_jax[text]'"
        ) from error

    pieces = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    cuts = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if cut == "smollm":
        cuts.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = {3, 4}  # of tokenizer.ggml.token_type: control and user-defined pieces
    kinds = fields.get("tokenizer.ggml.token_type", [])
    special = [piece for piece, kind in zip(pieces, kinds, strict=False) if kind in control]
    tokenizer.add_special_tokens(special)
    named = {
        f"{name}_token": pieces[fields[key]]
        for name, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in fields
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def to_folder(
    path: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None
) -> LMConfig:
    """Writes weights, config and text tokenizer of a GGUF file as a Hugging Face folder.

    Args:
      path: the file.
      folder: to write; it must not exist.
      dtype: of the weights; None is float32.

    Returns:
      The config.
    """
    tokenizer = text_tokenizer(path)
    config, params = language_model.load_language_model(path)
    fields, _ = read_gguf(path)
    more = {
        name: fields[f"tokenizer.ggml.{name}"]
        for name in ("bos_token_id", "eos_token_id")
        if f"tokenizer.ggml.{name}" in fields
    }
    language_model.save_language_model(folder, config, params, dtype=dtype, more=more)
    tokenizer.save_pretrained(os.fspath(folder))
    return config
