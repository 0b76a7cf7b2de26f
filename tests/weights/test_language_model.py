"""Hugging Face folders: loading, saving, mismatches; against transformers where installed."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tokenflow_jax.nets.lm import Decoder, LMConfig
from tokenflow_jax.weights import language_model, rules
from tokenflow_jax.weights.formats.safetensors import read_safetensors, write_safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
CASES = json.loads((GOLDEN / "language_models.json").read_text())


def state_of(case):
    return WEIGHTS["state_dict"](CASES[case]["shapes"], seed=0)


def write_folder(folder, case, state=None, shards=1, dtype=np.float32):
    """Write a Hugging Face folder as models are published."""
    folder.mkdir()
    state = {n: np.asarray(x, dtype) for n, x in (state or state_of(case)).items()}
    (folder / "config.json").write_text(json.dumps(CASES[case]["config"]))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", state)
        return folder
    names, weight_map = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {n: state[n] for n in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_trees_equal(one, other):
    one, other = rules.flatten(one), rules.flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("case", sorted(CASES))
def test_round_trip_through_a_folder(tmp_path, case):
    config, params = language_model.load_language_model(
        write_folder(tmp_path / "in", case, shards=3)
    )
    language_model.save_language_model(tmp_path / "out", config, params, shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, same = language_model.load_language_model(tmp_path / "out")
    assert again == config
    assert_trees_equal(same, params)
    saved = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        saved |= {n: t.read() for n, t in read_safetensors(file).items()}
    for name, array in state_of(case).items():
        np.testing.assert_array_equal(saved.pop(name), array, err_msg=name)
    assert not saved


def test_bfloat16_stays_or_becomes_float32(tmp_path):
    folder = write_folder(tmp_path / "in", "qwen2", dtype=ml_dtypes.bfloat16)
    config, kept = language_model.load_language_model(folder)
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"bfloat16"}
    _, wide = language_model.load_language_model(folder, dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), kept, wide)
    ids = jnp.arange(12).reshape(1, 12)
    exact = Decoder(config).apply({"params": wide}, ids, method="whole")
    rough = Decoder(config, jnp.bfloat16).apply({"params": kept}, ids, method="whole")
    assert rough.dtype == jnp.float32
    assert np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_parts_are_the_same_parts_of_the_whole(case, tmp_path):
    _, arrays = language_model.open_language_model(write_folder(tmp_path / "in", case))
    assert len(arrays) >= 12
    for name, tensor in arrays.items():
        array = tensor.read()
        for index in parts_of(array.shape):
            np.testing.assert_array_equal(tensor[index], array[index], err_msg=name)


def parts_of(shape):
    """One half of each axis, the other axes whole, and a corner."""
    whole = (slice(None),) * len(shape)
    for axis, size in enumerate(shape):
        for half in (slice(0, size // 2), slice(size // 2, size)):
            yield (*whole[:axis], half, *whole[axis + 1 :])
    yield tuple(slice(size // 3, size // 3 + 1) for size in shape)


def test_the_saved_head_of_a_tied_model_is_ignored(tmp_path):
    state = state_of("qwen2_tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _, params = language_model.load_language_model(
        write_folder(tmp_path / "in", "qwen2_tied", state)
    )
    assert "head" not in params


def test_all_mismatches_are_named(tmp_path):
    state = state_of("qwen2")
    del state["model.layers.1.self_attn.k_proj.bias"]
    state["model.layers.2.mlp.up_proj.weight"] = np.zeros((80, 47), np.float32)
    state["model.vision_tower.weight"] = np.zeros(3, np.float32)
    with pytest.raises(rules.CheckpointMismatch) as error:
        language_model.load_language_model(write_folder(tmp_path / "in", "qwen2", state))
    for name in ("1.self_attn.k_proj.bias", "2.mlp.up_proj.weight: (80, 47)", "vision_tower"):
        assert name in str(error.value)


def test_configs_of_other_models_are_refused():
    fields = CASES["llama"]["config"] | {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5},
    }
    del fields["vocab_size"]
    with pytest.raises(ValueError) as error:
        language_model.config_from_json(fields)
    for part in ("'gemma'", "'gelu'", "'llama3'", "vocab_size is missing"):
        assert part in str(error.value)
    old = CASES["qwen2"]["config"] | {"rope_theta": 5e5, "rope_scaling": None}
    del old["rope_parameters"]
    assert language_model.config_from_json(old).rope_theta == 5e5


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_key_value_heads"])
@pytest.mark.parametrize("value", ["abc", -1, 1e30, 2**62, [], [1], {}, True, "\x1b" * 999])
def test_sizes_of_wrong_types_are_named(tmp_path, name, value):
    fields = CASES["qwen2"]["config"] | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if name == "num_key_value_heads" and not value:
        return  # as many as heads
    with pytest.raises(ValueError, match=rf"config\.json(.|\n)*{name} is ") as error:
        language_model.read_config(tmp_path)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_scaling", "linear"),
        ("rope_parameters", [1]),
        ("rope_theta", "abc"),
        ("rope_theta", float("nan")),
        ("rms_norm_eps", None),
        ("hidden_act", ["silu"] * 10**5),
        ("model_type", {"a": 1}),
        ("model_type", None),
    ],
)
def test_other_values_of_wrong_types_are_named(tmp_path, name, value):
    fields = CASES["qwen2"]["config"] | {"rope_parameters": None, name: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"config\.json(.|\n)*{name}") as error:
        language_model.read_config(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "", "\x00", '{"a": \ud800'])
def test_a_config_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"config\.json .*fetch it again"):
        language_model.read_config(tmp_path)


def test_a_missing_config_and_an_unsupported_architecture_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        language_model.load_language_model(tmp_path)
    config = LMConfig(9, 32, 1, 4, 4, 48, norms="after", qk_norm=True)
    params = language_model.language_model_template(config)
    with pytest.raises(ValueError, match="norms after the sublayers"):
        language_model.save_language_model(tmp_path / "out", config, params)
    plain = dataclasses.replace(config, norms="before", qk_norm=False)
    with pytest.raises(ValueError, match=r"q_norm/scale: \(1, 8\) given, None in the config"):
        language_model.save_language_model(tmp_path / "out", plain, params)


@pytest.mark.parametrize("case", sorted(CASES))
def test_transformers_loads_what_is_saved(tmp_path, case):
    """Both ways through transformers' own files (with torch), and the same logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = language_model.load_language_model(write_folder(tmp_path / "in", case))
    language_model.save_language_model(tmp_path / "out", config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(0, config.vocabulary_size, (2, 30))
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    got = Decoder(config).apply({"params": params}, ids, method="whole")
    np.testing.assert_allclose(got, want, atol=5e-5, rtol=0)
    model.save_pretrained(tmp_path / "theirs")
    again, same = language_model.load_language_model(tmp_path / "theirs")
    assert again == config
    assert_trees_equal(same, params)
