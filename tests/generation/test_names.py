"""The generation checkpoint's names, through the conversion's functions and files."""

import dataclasses

import numpy as np
import pytest
from golden import generation as golden

from tokenflow_jax.generation.model import VARIANTS
from tokenflow_jax.stages import PARTS
from tokenflow_jax.weights import conversion, rules
from tokenflow_jax.weights.formats.torch import open_state_dict, write_safetensors


@pytest.mark.parametrize("name", ("s3", "s4"))
def test_there_and_back(tmp_path, name):
    """PyTorch to ours and back, bit for bit; the two ids that a file may hold are handed on."""
    case, part = golden.load(name), PARTS["generation"]
    ids = {"image_token_start": np.int64(129), "image_token_end": np.int64(384)}
    state = case.state | {key: np.asarray(value) for key, value in ids.items()}
    write_safetensors(tmp_path / "there.safetensors", state)
    conversion.convert(tmp_path / "there.safetensors", tmp_path / "ours", case.config, part=part)
    conversion.convert(tmp_path / "ours", tmp_path / "back.safetensors", part=part)
    back = open_state_dict(tmp_path / "back.safetensors")
    assert set(back) == set(state)
    for key, array in state.items():
        np.testing.assert_array_equal(back.read(key), array, err_msg=key)
    source = conversion.open_source(tmp_path / "ours", part=part)
    assert source.config == case.config


def test_what_does_not_fit_is_named():
    case, part = golden.load("s3"), PARTS["generation"]
    state = dict(case.state)
    del state["model.layers.1.self_attn.qknorm.key_norm.weight"]
    state["model.lvl_embed.weight"] = np.zeros((5, 64), np.float32)
    with pytest.raises(rules.CheckpointMismatch) as error:
        part.check(state, case.config)
    assert "1.self_attn.qknorm.key_norm" in str(error.value)
    assert "lvl_embed.weight: (5, 64) in the checkpoint, (4, 64)" in str(error.value)


def test_the_published_size():
    """7 billion parameters, and a table that knows all of them."""
    config = VARIANTS["7b"]
    part = PARTS["generation"]
    flat = rules.flatten(part.template(config))
    assert 7.0e9 < sum(np.prod(x.shape, dtype=np.int64) for x in flat.values()) < 7.1e9
    names = [n for path, x in flat.items() for n in part.table(config).find(path, x.shape)[1]]
    assert len(names) == len(set(names)) == 32 * 11 + 3 + 6
    assert dataclasses.asdict(config)["lm"]["norms"] == "after"
