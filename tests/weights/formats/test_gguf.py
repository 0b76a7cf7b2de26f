"""GGUF files from a small writer: quantized blocks, row order, text tokenizer, damage."""

import json
import pathlib
import runpy
import struct

import gguf as package
import ml_dtypes
import numpy as np
import pytest

from tokenflow_jax.weights import language_model, rules
from tokenflow_jax.weights.formats import gguf
from tokenflow_jax.weights.names.decoder import GGUF_NAMES, gguf_tensors

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
CASES = json.loads((GOLDEN / "language_models.json").read_text())
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "I8": 24, "BF16": 30}
THEIRS = {theirs: ours for ours, theirs in GGUF_NAMES.items()}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(item):
    """Return the kind and bytes of a header's value."""
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, text(item)
    kinds = {value(x)[0] for x in item}
    body = b"".join(value(x)[1] for x in item)
    return 9, struct.pack("<IQ", kinds.pop(), len(item)) + body


def encode(array, kind):
    """Return the bytes of a tensor; quantization loses precision."""
    if kind in ("F32", "F16", "BF16"):
        names = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        return array.astype(names[kind]).tobytes()
    out = []
    for block in array.reshape(-1, 32):
        low, high = block.min(), block.max()
        if kind == "Q8_0":
            scale = np.float16(np.abs(block).max() / 127)
            numbers = np.round(block / np.float32(scale)).astype(np.int8)
            out.append(scale.tobytes() + numbers.tobytes())
            continue
        first = np.float16(low if kind == "Q4_1" else 0)
        scale = np.float16((high - low) / 15 if kind == "Q4_1" else np.abs(block).max() / 7)
        shift = 0 if kind == "Q4_1" else 8
        numbers = np.round((block - np.float32(first)) / np.float32(scale)) + shift
        numbers = np.clip(numbers, 0, 15).astype(np.uint8)
        packed = numbers[:16] | (numbers[16:] << 4)
        head = scale.tobytes() + (first.tobytes() if kind == "Q4_1" else b"")
        out.append(head + packed.tobytes())
    return b"".join(out)


def write(path, fields, tensors, raw=None):
    """Write `tensors`, name -> (array, type), or one tensor whose data is `raw`."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, item in fields.items():
        kind, body = value(item)
        head += text(name) + struct.pack("<I", kind) + body
    data = b""
    for name, (array, kind) in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim)
        head += b"".join(struct.pack("<Q", size) for size in reversed(array.shape))
        head += struct.pack("<IQ", TYPES.get(kind, kind), len(data))
        body = raw or (encode(array, kind) if kind != "I8" else b"")
        data += body + b"\0" * (-len(body) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def interleaved(weight, heads):
    """Return the rows in llama.cpp's order: the halves of each head alternate."""
    rows = [
        head * 2 * half + part * half + i
        for half in [weight.shape[0] // heads // 2]
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]
    return weight[rows]


def model_file(path, case="llama_grouped", **changes):
    config = language_model.config_from_json(CASES[case]["config"])
    state = WEIGHTS["state_dict"](CASES[case]["shapes"], seed=0)
    tensors = {}
    for name, array in state.items():
        module, kind = name.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        heads = {"self_attn.q_proj": config.heads, "self_attn.k_proj": config.kv_heads}
        if module in heads and not config.qkv_bias:
            array = interleaved(array, heads[module])
        tensors[f"{layer}{THEIRS[module]}.{kind}"] = (array, "F32")
    kind = CASES[case]["config"]["model_type"]
    fields = {
        "general.architecture": kind,
        f"{kind}.block_count": config.layers,
        f"{kind}.embedding_length": config.width,
        f"{kind}.feed_forward_length": config.mlp_width,
        f"{kind}.attention.head_count": config.heads,
        f"{kind}.attention.head_count_kv": config.kv_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{kind}.rope.freq_base": config.rope_theta,
        f"{kind}.vocab_size": config.vocabulary_size,
        "general.languages": ["en"],
        "tokenizer.ggml.add_bos_token": False,
    }
    if config.head_width and not config.qkv_bias:
        fields[f"{kind}.attention.key_length"] = config.head_width
    return write(path, fields | changes, tensors), config, state


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_model_survives_the_round_trip(tmp_path, case):
    path, config, state = model_file(tmp_path / "m.gguf", case)
    found, params = language_model.load_language_model(path)
    assert found == config
    table, template = (
        language_model.language_model_table(config),
        language_model.language_model_template(config),
    )
    want = rules.flatten(rules.to_flax(state, table, template))
    got = rules.flatten(params)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("kind, bits", [("F16", 10), ("BF16", 8), ("Q8_0", 7), ("Q4_1", 4)])
def test_types_keep_their_precision(tmp_path, kind, bits):
    array = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    path = write(tmp_path / "t.gguf", {}, {"first": (array[:1], "F32"), "x": (array, kind)})
    _, tensors = gguf.read_gguf(path)
    step = np.ptp(array.reshape(-1, 32), axis=1).max() / 2**bits
    np.testing.assert_allclose(tensors["x"].read(), array, atol=step)
    np.testing.assert_array_equal(tensors["first"].read(), array[:1])


def test_four_bit_blocks_by_hand(tmp_path):
    """Numbers 0 to 15 up and down, low nibbles first; Q4_0 is centered at 8, Q4_1 has a minimum."""
    numbers = np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.float32)
    packed = (np.arange(16) | (np.arange(16)[::-1] << 4)).astype(np.uint8).tobytes()
    half, least = np.float16(0.5).tobytes(), np.float16(-3).tobytes()
    for kind, head, want in (
        ("Q4_0", half, (numbers - 8) / 2),
        ("Q4_1", half + least, numbers / 2 - 3),
    ):
        path = write(tmp_path / f"{kind}.gguf", {}, {"x": (want[None], kind)}, head + packed)
        np.testing.assert_array_equal(gguf.read_gguf(path)[1]["x"].read()[0], want)


@pytest.mark.parametrize("kind", ["Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_other_types_match_the_package(tmp_path, kind):
    number = package.GGMLQuantizationType[kind]
    count, block = package.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * block), np.uint8)  # finite scales
    path = write(
        tmp_path / "t.gguf",
        {},
        {"x": (np.zeros((3, 2 * count), np.float32), int(number))},
        raw.tobytes(),
    )
    found = gguf.read_gguf(path)[1]["x"].read()
    assert found.shape == (3, 2 * count) and np.isfinite(found).all() and found.std() > 0
    np.testing.assert_array_equal(found, package.dequantize(raw, number))


def test_unreadable_files_are_explained(tmp_path):
    array = np.ones((2, 32), np.float32)
    tensors = dict.fromkeys(("one", "two"), (array, "I8"))
    with pytest.raises(ValueError, match=r"(?s)one: type 24 is not read.*two: type 24"):
        gguf.read_gguf(write(tmp_path / "t.gguf", {}, tensors))
    path, *_ = model_file(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for cut, message in ((20, "not a GGUF"), (300, "damaged"), (len(whole) - 999, "fetch it")):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=message):
            language_model.load_language_model(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="not a GGUF"):
        language_model.load_language_model(path)
    scaled, *_ = model_file(tmp_path / "s.gguf", **{"llama.rope.scaling.type": "linear"})
    with pytest.raises(ValueError, match="rope_type is 'linear'"):
        language_model.load_language_model(scaled)
    with pytest.raises(ValueError, match="vocabulary of kind None"):
        gguf.text_tokenizer(scaled)


def test_a_model_of_any_name_is_read(tmp_path):
    path, config, _ = model_file(tmp_path / "model.bin")
    assert gguf.is_gguf(path)
    assert language_model.load_language_model(path)[0] == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_length", "abc"),
        ("block_count", 2**31),
        ("attention.head_count_kv", [2, 2]),
        ("attention.layer_norm_rms_epsilon", "small"),
        ("rope.freq_base", [1.0]),
        ("rope.scaling.type", [1]),
        ("vocab_size", True),
    ],
)
def test_header_values_of_wrong_types_are_named(tmp_path, name, value):
    path, *_ = model_file(tmp_path / "m.gguf", **{f"llama.{name}": value})
    with pytest.raises(ValueError, match=r"m\.gguf is no model that can be loaded"):
        language_model.load_language_model(path)


@pytest.mark.parametrize("name", ["x", "blk.weight", "blk", "blk.0.1.attn_q.weight", ""])
def test_strange_names_of_tensors_stay(tmp_path, name):
    path, config, _ = model_file(tmp_path / "m.gguf")
    _, tensors = gguf.read_gguf(path)
    one = next(iter(tensors.values()))
    assert gguf_tensors({name: one}, config).keys() == {name}


VOCABULARY = {
    "model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "merges": ["a b"],
    "token_type": [1, 1, 1], "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 3},
        {"tokens": [1, 2]},
        {"merges": ["a"]},
        {"merges": ["x y"]},
        {"merges": "a b"},
        {"eos_token_id": 3},
        {"eos_token_id": "a"},
        {"model": [1] * 999},
    ],
)
def test_vocabularies_of_wrong_types_are_named(tmp_path, change):
    pytest.importorskip("transformers")
    fields = {f"tokenizer.ggml.{name}": v for name, v in (VOCABULARY | change).items()}
    path = write(tmp_path / "m.gguf", fields, {})
    with pytest.raises(ValueError, match=r"m\.gguf") as error:
        gguf.text_tokenizer(path)
    assert len(str(error.value)) < 1000


def test_text_tokenizer_and_folder(tmp_path):
    """Byte-level BPE: merges, single digits, special pieces; and the whole folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|end|>", *alphabet, "Ġt", "Ġth", "12"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3] + [1] * (len(pieces) - 1),
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "1 2"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
    }
    path, *_ = model_file(tmp_path / "m.gguf", **fields)
    tokenizer = gguf.text_tokenizer(path)
    ids = tokenizer.encode("a then 12<|end|>é")
    # Digits stay apart although a merge would join them.
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["a", "Ġth", "e", "n", "Ġ", "1"]
    assert ids[-3] == tokenizer.eos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a then 12é"
    config = language_model.gguf_to_folder(path, tmp_path / "folder", dtype="bfloat16")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again.encode("a then 12<|end|>é") == ids and again.eos_token_id == 0
    found, params = language_model.load_language_model(tmp_path / "folder")
    assert found == config
    assert params["norm"]["scale"].dtype == ml_dtypes.bfloat16
