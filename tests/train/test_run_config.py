"""Keys that were renamed: old checkpoints are read under the new names, old configs are refused."""

import json
from pathlib import Path

import pytest
from config_files import generation, tokenizer, understanding, unified

from tokenflow_jax.train import loop, run_config

OLD = {
    "stage": "generation",
    "text": {"tokenizer": "words", "budget": 12},
    "data": {"name": "emoji", "fingerprint": "0123", "features": "once", "text_tokenizer": "bytes"},
    "losses": {"tokens": 4096, "text_weight": 0.0},
    "eval": {"images": 5, "batch_size": 2},
    "tokenizer": {"path": "runs/quickstart"},
    "remat": True,
}


def test_a_config_of_before_is_read_under_the_new_keys():
    new = run_config.upgrade(OLD)
    assert new == {
        "stage": "generation",
        "text_tokenizer": "words",
        "data": {"name": "emoji", "max_length": 12, "encode": "once"},
        "losses": {"text_weight": 0.0},
        "loss_tokens": 4096,
        "eval": {"examples": 5, "batch_size": 2},
        "tokenizer": {"path": "runs/quickstart", "fingerprint": "0123"},
        "remat": "block",
    }
    assert run_config.upgrade(new) == new
    assert OLD["data"]["fingerprint"] == "0123"  # the caller's own is not changed
    understanding = {"eval": {"conversations": 3}, "remat": "dots"}
    assert run_config.upgrade(understanding) == {"eval": {"examples": 3}, "remat": "dots"}
    codebook = {"codebook": {"update": "ema"}}
    assert run_config.upgrade(codebook) == {"codebook": {"learning": "ema"}}


@pytest.mark.parametrize("config", [tokenizer, generation, understanding, unified])
def test_a_run_of_before_a_key_existed_goes_on(config):
    """The quickstarts' configs as they were saved: a key that came later needs a line in BEFORE."""
    name = Path(config.__file__).stem
    saved = json.loads(Path(__file__).with_name("saved_configs.json").read_text())[name]
    new = run_config.config_to_dict(config.get_config())
    loop.check_config_change(run_config.upgrade(saved), new, "checkpoint")


def test_a_run_with_an_old_key_is_told_the_new_one():
    with pytest.raises(ValueError, match=r"config\.text\.tokenizer is now config\.text_tokenizer"):
        run_config.refuse_old_keys({"text": {"tokenizer": "words"}})
    with pytest.raises(ValueError, match=r"config\.remat is now 'none' or 'block'"):
        run_config.refuse_old_keys({"remat": False})
    run_config.refuse_old_keys(run_config.upgrade(OLD))


def test_runs_of_before_adapters_had_none():
    new = run_config.config_to_dict(understanding.get_config())
    old = {name: value for name, value in new.items() if name != "lora"}
    assert not run_config.config_differences(old, new)
    changed = {**new, "lora": {**new["lora"], "rank": 4}}
    assert run_config.config_differences(old, changed) == {"lora.rank": (0, 4)}


def test_runs_of_before_options_had_the_first_ones():
    new = run_config.config_to_dict(generation.get_config())
    model = {k: v for k, v in new["model"].items() if k not in ("rope", "scale_inputs")}
    old = {**new, "model": model}
    assert not run_config.config_differences(old, new)
    changed = {**new, "model": {**new["model"], "rope": "3d"}}
    assert run_config.config_differences(old, changed) == {"model.rope": ("1d", "3d")}
