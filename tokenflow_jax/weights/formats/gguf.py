"""Reads GGUF files: keys and values, tensors (dequantized by the `gguf` package), text tokenizer.

The package's own reader of headers crashes on damaged files and is slower.
"""

import functools
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.messages import bullets, one_line, shown
from tokenflow_jax.weights.lazy import MOST_TENSORS, LazyTensor, part_shape, read_block, whole

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 4_000_000  # of all arrays, each a Python object
_MOST_AXES = 8  # llama.cpp has four
_DAMAGED = (struct.error, ArithmeticError, MemoryError, RecursionError, TypeError, ValueError)


class _Reader:
    """Reads the header from a position onwards."""

    def __init__(self, data: Any, at: int):
        self.data, self.at, self.left = data, at, _MOST_VALUES

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
            self.left -= count
            if count > len(self.data) - self.at or self.left < 0 or inner == _ARRAY:
                raise ValueError(f"an array of {count} values of kind {inner}")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown kind {kind}")
        return self.scalar(_SCALARS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        # A tensor's name, shape (rows first), type and offset.
        name, axes = self.string(), self.scalar("I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor with {axes} axes")
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")


def is_gguf(path: str | os.PathLike) -> bool:
    """Tell a GGUF file by its ending or its first bytes."""
    if os.fspath(path).endswith(".gguf") or remote.kind_of(path) != "file":
        return os.fspath(path).endswith(".gguf")
    if remote.is_remote(path):
        return remote.RemoteFile(path).read(0, 4) == b"GGUF"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the keys and values of a GGUF file, and its tensors by name.

    Tensors are float32, (out, in) for matrices, and dequantized when they are read. A file that is
    missing, damaged, not GGUF 2 or 3, or with unknown tensor types is a ValueError.
    """
    path = remote.local_copy(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file, or no regular one")
    if (size := os.path.getsize(path)) < 24:
        raise ValueError(f"{path}: not a GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        reader = _Reader(data, 4)
        try:
            version = reader.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"version {version}, not 2 or 3")
            count, keys = reader.scalar("Q"), reader.scalar("Q")
            if count > MOST_TENSORS:
                raise ValueError(f"{count} tensors")
            fields = {}
            for _ in range(keys):
                name = reader.string()
                fields[name] = reader.value(reader.scalar("I"))
            entries = [reader.entry() for _ in range(count)]
            alignment = fields.get("general.alignment", 32)
            if type(alignment) is not int:
                raise ValueError(f"alignment {shown(alignment)}")
            start = reader.at + -reader.at % alignment
        except _DAMAGED as error:
            reason = one_line(error)
            raise ValueError(f"{path}: damaged GGUF header ({reason}); fetch it again") from None
    return fields, _tensors(path, entries, start, size)


@functools.cache
def _block(number: int) -> tuple[Any, int, int] | None:
    """Return a type's name, and the weights and bytes of its blocks; None if it is not read."""
    import gguf  # here, so that programs without GGUF files start quickly

    try:
        kind = gguf.GGMLQuantizationType(number)
        count, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind, count, size


def _tensors(path: str, entries: list, start: int, size: int) -> dict[str, LazyTensor]:
    import gguf

    tensors, problems = {}, []
    for name, shape, number, offset in entries:
        if (known := _block(number)) is None:
            problems.append(f"{name}: type {number} is not read; take a file in Q8_0, F16 or F32")
            continue
        kind, count, block = known
        columns = shape[-1] if shape else 1
        rows, width = math.prod(shape[:-1]), columns // count * block
        if columns % count or start + offset + rows * width > size:
            problems.append(f"{name}: {shape} at byte {start + offset} of {size}; fetch it again")
            continue

        def load(index, kind=kind, shape=shape, begin=start + offset, width=width):
            # Blocks lie within rows: those that hold the part are dequantized.
            first = index[0] if len(shape) > 1 else slice(0, 1)
            rows = math.prod(shape[1:-1])
            begin += first.start * rows * width
            rows *= first.stop - first.start
            if not rows * width:
                return np.zeros(part_shape(index), np.float32)
            blocks = read_block(path, begin, rows * width).reshape(rows, width)
            found = gguf.dequantize(blocks, kind)
            if len(shape) > 1:
                return found.reshape(-1, *shape[1:])[:, *index[1:]]
            return found.reshape(shape)[index]

        read = functools.partial(load, whole(shape))
        try:
            tensors[name] = LazyTensor(name, shape, np.dtype(np.float32), read, load)
        except ValueError as error:
            problems.append(f"{error}; fetch it again")
    if problems:
        raise ValueError(f"{path}: unreadable tensors:\n{bullets(problems)}")
    return tensors


# The splitting of text before merging, by the name that GGUF gives to it.
_SPLITS = ("gpt-2", "smollm")


def text_tokenizer(path: str | os.PathLike) -> Any:
    """Return the text tokenizer of a GGUF file as transformers' PreTrainedTokenizerFast.

    It must be a byte-level BPE that splits text as GPT-2 or SmolLM does (else ValueError).
    """
    fields, _ = read_gguf(path)
    path = os.fspath(path)
    kind, split = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or split not in _SPLITS:
        raise ValueError(
            f"{path}: a vocabulary of kind {shown(kind)}, {shown(split)}, is not read, only "
            f"'gpt2' with {' or '.join(map(repr, _SPLITS))}; use the model's tokenizer.json"
        )
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise ValueError(
            "text tokenizers need the package transformers: pip install 'tokenflow_jax[text]'"
        ) from error

    pieces = _texts(fields, "tokens", path)
    merges = [tuple(merge.split(" ")) for merge in _texts(fields, "merges", path)]
    try:
        model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    except Exception as error:  # the package has no type of its own
        raise ValueError(f"{path}: no vocabulary ({one_line(error)}); fetch it again") from None
    tokenizer = tokenizers.Tokenizer(model)
    splits = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split == "smollm":
        splits.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    control = {3, 4}  # control and user-defined pieces
    special = [piece for piece, kind in zip(pieces, kinds, strict=False) if kind in control]
    tokenizer.add_special_tokens(special)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{n}_token": fields.get(f"tokenizer.ggml.{t}_token_id") for n, t in names.items()}
    for name, number in ids.items():
        if number is not None and not (type(number) is int and number < len(pieces)):
            raise ValueError(f"{path}: {name} is {shown(number)} of {len(pieces)}; fetch it again")
    template = fields.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **{name: pieces[number] for name, number in ids.items() if number is not None},
    )


def _texts(fields: dict[str, Any], name: str, path: str) -> list[str]:
    texts = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: tokenizer.ggml.{name} is {shown(texts)}, no list of texts")
    return texts
