"""The names of generation checkpoints, through the converter."""

import dataclasses

import numpy as np
import pytest
from golden import generation as golden

from tokenflow_jax.generation.model import VARIANTS
from tokenflow_jax.generation.names import PART
from tokenflow_jax.weights import conversion, rules
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import open_state_dict


@pytest.mark.parametrize("name", ("s3", "s4"))
def test_there_and_back(tmp_path, name):
    """PyTorch to ours and back, bit for bit; the two ids that a file may hold survive."""
    case = golden.load(name)
    ids = {"image_token_start": np.int64(129), "image_token_end": np.int64(384)}
    state = case.state | {key: np.asarray(value) for key, value in ids.items()}
    write_safetensors(tmp_path / "there.safetensors", state)
    conversion.convert(tmp_path / "there.safetensors", tmp_path / "ours", PART, case.config)
    conversion.convert(tmp_path / "ours", tmp_path / "back.safetensors", PART)
    back = open_state_dict(tmp_path / "back.safetensors")
    assert set(back) == set(state)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key].read(), array, err_msg=key)
    source = conversion.open_source(tmp_path / "ours", PART)
    assert source.config == case.config


def test_mismatches_are_named():
    case = golden.load("s3")
    state = dict(case.state)
    del state["model.layers.1.self_attn.qknorm.key_norm.weight"]
    state["model.lvl_embed.weight"] = np.zeros((5, 64), np.float32)
    with pytest.raises(rules.CheckpointMismatch) as error:
        PART.check(state, case.config)
    assert "1.self_attn.qknorm.key_norm" in str(error.value)
    assert "lvl_embed.weight: (5, 64) in the checkpoint, (4, 64)" in str(error.value)


def test_the_published_size():
    """The table knows all of the 7 billion parameters."""
    config = VARIANTS["7b"]
    flat = rules.flatten(PART.template(config))
    assert 7.0e9 < sum(np.prod(x.shape, dtype=np.int64) for x in flat.values()) < 7.1e9
    names = [n for path, x in flat.items() for n in PART.table(config).find(path, x.shape)[1]]
    assert len(names) == len(set(names)) == 32 * 11 + 3 + 6
    assert dataclasses.asdict(config)["lm"]["norms"] == "after"
