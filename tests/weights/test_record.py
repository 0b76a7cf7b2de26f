"""Files of ours say which model they hold; hostile and contradicting records are one line."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import tiny
import torch_states

import tokenflow_jax as tfx
from tokenflow_jax import convert as command
from tokenflow_jax.generation.names import PART as GENERATION
from tokenflow_jax.tokenizer import frozen
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.weights import conversion, record, start
from tokenflow_jax.weights.formats.torch import open_state_dict, open_state_dicts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same tokenizer as a directory of ours and, exported from there, in both file formats."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_tokenizer(folder / "ours")
    for name in ("mine.safetensors", "mine.pt"):
        conversion.convert(folder / "ours", folder / name, PART)
    return folder


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pt"])
def test_an_exported_file_needs_no_variant(folder, tmp_path, name):
    ours, loaded = (tfx.Tokenizer.load(folder / file) for file in ("ours", name))
    assert loaded.config == ours.config == tiny.TINY
    assert loaded.fingerprint == ours.fingerprint
    about = record.read_record(folder / name)
    assert about["tokenizer"] == ours.identity
    assert (about["stage"], about["version"]) == ("tokenizer", tfx.__version__)
    run = [f"--src={folder / name}", f"--dst={tmp_path / 'back'}", "--to=orbax"]
    assert command.run(run) == 0
    assert tfx.Tokenizer.load(tmp_path / "back").fingerprint == ours.fingerprint
    named = _section(path=str(folder / name), variant="")
    assert frozen.find_config(named) == tiny.TINY
    assert not start.is_language_model(str(folder / name))


def _section(**values):
    import ml_collections

    return ml_collections.ConfigDict(values)


def test_the_tensors_are_those_of_a_file_without_a_record(folder):
    """Names, order, shapes and bytes; torch reads {"model": state_dict} as before."""
    ours = conversion.open_source(folder / "ours", PART)
    expected = torch_states.to_torch(
        {name: tensor.read() for name, tensor in ours.arrays.items()},
        PART.table(tiny.TINY),
        PART.buffers(tiny.TINY),
    )
    for name in ("mine.safetensors", "mine.pt"):
        state = open_state_dict(folder / name)
        assert list(state) == list(expected)
        for key, tensor in state.items():
            assert tensor.read().tobytes() == expected[key].tobytes()
    assert set(open_state_dicts(folder / "mine.pt")) == {"model", "tokenflow_jax"}


def test_the_fingerprint_is_of_the_weights_that_were_written(folder, tmp_path):
    conversion.convert(folder / "ours", tmp_path / "half.safetensors", PART, dtype="bfloat16")
    about = record.read_record(tmp_path / "half.safetensors")
    loaded = tfx.Tokenizer.load(tmp_path / "half.safetensors")
    assert about["tokenizer"]["fingerprint"] == loaded.fingerprint
    assert loaded.fingerprint != tfx.Tokenizer.load(folder / "ours").fingerprint


def test_what_contradicts_the_record_is_refused(folder, monkeypatch):
    path = folder / "mine.safetensors"
    with pytest.raises(ValueError, match="does not hold variant 'b', but TokenizerConfig"):
        tfx.Tokenizer.load(path, "b")
    with pytest.raises(ValueError, match="knows its own scales"):
        tfx.Tokenizer.load(path, scales=(2, 4))
    with pytest.raises(ValueError, match="of stage 'tokenizer', not of 'generation'"):
        conversion.open_source(path, GENERATION)
    other = dataclasses.replace(tiny.TINY, pixel_weight=3.0)
    with pytest.raises(ValueError, match="does not hold"):
        conversion.open_source(path, PART, other)
    assert conversion.open_source(path, PART, tiny.TINY).config == tiny.TINY


def _rewrite(path, out, text):
    """Copy a .safetensors file with another text as its record."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["tokenflow_jax"] = text
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    out.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "damaged.*it lacks 'stage'; it lacks 'model'"),
        ('{"stage": 1, "model": {}}', "damaged.*it lacks 'stage'"),
        ('{"stage": "tokenizer", "model": {}, "tokenizer": 3}', "damaged.*config.tokenizer is 3"),
        ('{"stage": "tokenizer", "model": {"image_size": 1e99}}', "model is damaged"),
        ('{"stage": "tokenizer", "model": {"channels": 99999999999}}', "model is damaged"),
        ('{"stage": "tokenizer", "model": {"\\u001b[2J": 1}}', "model is damaged"),
        ('{"stage": "\\u001b[2J", "model": {}}', "not of 'tokenizer'"),
        ('{"stage": "' + "x" * 2**20 + '"}', "more than the 1,048,576 bytes"),
        ("[" * 10**5, "too deep"),
    ],
)
def test_a_damaged_record_is_one_line(folder, tmp_path, text, message):
    _rewrite(folder / "mine.safetensors", tmp_path / "x.safetensors", text)
    with pytest.raises(ValueError, match=message) as error:
        tfx.Tokenizer.load(tmp_path / "x.safetensors")
    said = str(error.value)
    assert "\n" not in said and len(said) < 1000 and "\x1b" not in said


def test_files_of_others_have_none(tmp_path):
    from tokenflow_jax.weights.formats.safetensors import write_safetensors

    write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)})
    assert record.read_record(tmp_path / "a.safetensors") is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert record.read_record(tmp_path) is None
    assert record.read_record(tmp_path / "nothing.pt") is None
