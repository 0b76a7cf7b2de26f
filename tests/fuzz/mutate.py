"""Mutations of small files: of their bytes, and of JSON, zip files, pickles and safetensors."""

import gzip
import io
import json
import pickle
import pickletools
import random
import re
import struct
import warnings
import zipfile
import zlib

BOUNDARIES = [0, 1, 2, 4, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
BOUNDARIES += [2**40, 2**47, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WHOLE = [
    b"",
    b"\0" * 99,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b"\xff\xfe" * 50,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4\n",
    b"<!DOCTYPE html>\n<html>\x1b[31m</html>",
    b"\x80\x02]r\0\0\0\x0b.",
    struct.pack("<Q", 100_000) + b"[" * 100_000,
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    size = max(1, len(out))
    at = rng.randrange(size)
    choice = rng.randrange(9)
    if choice == 0:
        for _ in range(rng.randint(1, 8)):
            if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif choice == 1:
        del out[at:]
    elif choice == 2:
        out[at:at] = rng.choice(
            [rng.randbytes(rng.randint(1, 40)), bytes([rng.randrange(256)]) * 64]
        )
    elif choice == 3:
        del out[at : at + rng.randint(1, 1 + size // 4)]
    elif choice == 4:
        start = rng.randrange(size)
        piece = bytes(out[start : start + rng.randint(1, 200)])
        out[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece
    elif choice in (5, 6):
        code = rng.choice(["<H", "<I", "<Q", ">I", ">Q", "<B"])
        most = 2 ** (8 * struct.calcsize(code)) - 1
        out[at : at + struct.calcsize(code)] = struct.pack(code, min(most, rng.choice(BOUNDARIES)))
    elif choice == 7:
        numbers = list(re.finditer(rb"\d+", data))
        if numbers:
            found = rng.choice(numbers)
            out[found.start() : found.end()] = str(rng.choice(BOUNDARIES)).encode()
    elif rng.random() < 0.2:
        out[:] = rng.choice(WHOLE)
    else:
        out[at:at] = rng.choice(
            [b"\xff", b"\xed\xa0\x80", b"\0", b"\x1b[2J", b"\xe2\x80\xa8", b"\r"]
        )
    return bytes(out)


class _Raw(str):
    """Text that goes into JSON as it is."""


def _values(rng: random.Random) -> list:
    deep = []
    for _ in range(rng.choice([5, 60, 900])):
        deep = [deep]
    return [
        None, True, False, -1, 0, 1, 7, 1.5, -0.0, 1e30, 2**31, 2**63, 2**64, 10**30, [], {}, "",
        "abc", "../outside.png", "/dev/zero", "a\0b", "\ud800", "\x1b[2J\x9b", "x" * 5000, [1, "a"],
        {"a": {"b": []}}, deep, ".", "..", "1", float("nan"), float("inf"), _Raw("9" * 5000),
    ]  # fmt: skip


def _places(value, path=()):
    yield path
    if isinstance(value, dict | list) and len(path) < 50:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _places(item, (*path, key))


def _dump(value, rng: random.Random) -> str:
    """Write JSON in which a key may stand twice."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, list) and len(value) < 50:
        return "[" + ",".join(_dump(item, rng) for item in value) + "]"
    if isinstance(value, dict):
        pairs = list(value.items())
        if pairs and rng.random() < 0.05:
            pairs.append((rng.choice(pairs)[0], rng.choice(_values(rng))))
        return "{" + ",".join(f"{json.dumps(str(k))}:{_dump(v, rng)}" for k, v in pairs) + "}"
    return json.dumps(value, ensure_ascii=rng.random() < 0.8)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(list(_places(value)))
        if not path:
            value = rng.choice(_values(rng)) if rng.random() < 0.1 else value
            continue
        *above, last = path
        holder = value
        for key in above:
            holder = holder[key]
        choice = rng.randrange(4)
        if choice == 0:
            del holder[last]
        elif choice == 1 and isinstance(holder, dict):
            holder[rng.choice(["extra", "\x1b", "", "__metadata__", "x" * 999])] = holder.pop(last)
        else:
            holder[last] = rng.choice(_values(rng))
    try:
        return _dump(value, rng).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([mutate_json, mutate_bytes])(lines[at], rng)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


_SNIPPETS = [
    b"r\0\0\0\x0b", b"p999999999999\n", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\xff" * 8,
    b"\x96" + b"\0" * 5 + b"\x01\0\0", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"2", b"0", b"(",
    b"t", b"l", b"d", b"}", b"]", b")", b"\x85", b"\x86", b"2\x86" * 70, b"]2\x86" * 40, b"R", b"b",
    b"s", b"u", b"e", b"a", b"N", b"\x88", b"K\xff", b"J\0\0\0\x80",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"\x81", b"\x92", b"\x8f",
    b"\x90", b"\x91", b"\x93", b"\x94", b"h\0", b"h\x01", b"h\x02", b"j\0\0\0\0", b"Q", b"P0\n",
    b"X\x01\0\0\0a", b"(h\0h\0d", b"I" + b"9" * 5000 + b"\n", b"\x8b\x10\0\0\0" + b"\x7f" * 16,
    b"ctorch\nSize\n", b"(" * 500, b"]" * 500, b"\x82\x01", b"V\xed\xa0\x80\n", b"c\x1b[2J\nx\n",
]  # fmt: skip


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Insert, delete or repeat whole opcodes; or unfold lists that share their parts."""
    if rng.random() < 0.03:
        return nested_pickle(rng)
    try:
        starts = [at for _, _, at in pickletools.genops(data)]
    except Exception:  # mutated before
        return mutate_bytes(data, rng)
    at = rng.randrange(len(starts))
    start, end = starts[at], starts[at + 1] if at + 1 < len(starts) else len(data)
    choice = rng.randrange(4)
    if choice == 0:
        return data[:start] + data[end:]
    if choice == 1:
        other = rng.randrange(len(starts) - 1)
        piece = data[starts[other] : starts[min(other + rng.randint(1, 9), len(starts) - 1)]]
        return data[:start] + piece + data[start:]
    return data[:start] + rng.choice(_SNIPPETS) + data[start:]


def nested_pickle(rng: random.Random) -> bytes:
    make = rng.choice(
        [lambda x: [x, x], lambda x: (x, x), lambda x: {"a": x, "b": x}, lambda x: {"model": x}]
    )
    value = rng.choice([[], {}, ()])
    for _ in range(rng.choice([3, 60, 200])):
        value = make(value)
    wrapped = rng.choice([value, {"model": value}, [value, 1]])
    data = pickle.dumps(wrapped, 2)
    if isinstance(value, tuple) and rng.random() < 0.5:  # as a key
        data = b"\x80\x02}" + pickle.dumps(value, 2)[2:-1] + b"K\x01s."
    return data


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Change, add, compress, rename, repeat or leave out members, or the file's directory."""
    if rng.random() < 0.2:
        start = data.rfind(b"PK\x01\x02", 0, max(1, len(data) - rng.choice([0, 60, 200])))
        return data[:start] + mutate_bytes(data[start:], rng) if start > 0 else data[:-1]
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # mutated before
        return mutate_bytes(data, rng)
    if not members:
        return data
    at, compressed, choice = rng.randrange(len(members)), None, rng.randrange(10)
    name, content = members[at]
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(".pkl")]
    if choice < 6:
        at = rng.choice(pickles) if pickles and rng.random() < 0.8 else at
        name, content = members[at]
        how = mutate_pickle if at in pickles and rng.random() < 0.8 else mutate_bytes
        members[at] = name, how(content, rng)
    elif choice == 6:
        members.pop(at)
    elif choice == 7:
        members[at] = rng.choice([f"../{name}", f"/{name}", "", name * 2, "x\x1b.pkl"]), content
    elif choice == 8:
        members.insert(at, members[rng.randrange(len(members))])
    else:
        compressed = at
        if rng.random() < 0.1:
            members[at] = name, bytes(2**24)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # the same name twice
        for i, (name, content) in enumerate(members):
            kind = zipfile.ZIP_DEFLATED if i == compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name or "x"), content, kind)
    return out.getvalue()


def mutate_gzip(data: bytes, rng: random.Random) -> bytes:
    try:
        return gzip.compress(mutate_bytes(gzip.decompress(data), rng), 1)
    except (OSError, EOFError, zlib.error):  # mutated before
        return mutate_bytes(data, rng)


KINDS = {
    "gzip": mutate_gzip,
    "json": mutate_json,
    "lines": mutate_lines,
    "safetensors": mutate_safetensors,
    "pickle": mutate_pickle,
    "zip": mutate_zip,
    "bytes": mutate_bytes,
}


def mutate(seed: dict[str, bytes], kinds: dict[str, str], rng: random.Random) -> dict[str, bytes]:
    """Return files of which one or two are changed; `kinds` are by the files' endings."""
    files = dict(seed)
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice(sorted(files))
        if rng.random() < 0.01:
            del files[name]
            return files or {name: b""}
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "bytes")
        change = KINDS[kind if rng.random() < 0.65 else "bytes"]
        files[name] = change(files[name], rng)
    return files
