"""Names of wrapped modules: FSDP's, torch.compile's and those of training classes."""

import logging

import numpy as np
import pytest
import tiny
from torch_states import random_state, tiny_part

from tokenflow_jax.log import log
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.rules import CheckpointMismatch
from tokenflow_jax.weights.wrappers import unwrapped

EXPECTED = {"encoder.conv.weight", "model.norm.weight", "decoder.weight"}


def names(*state):
    return list(unwrapped(dict.fromkeys(state, 0), EXPECTED, lambda name: name == "quantize.used"))


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("encoder.conv.weight", "encoder.conv.weight"),
        ("encoder._orig_mod.conv.weight", "encoder.conv.weight"),
        ("module.model.encoder.conv.weight", "encoder.conv.weight"),
        ("_fsdp_wrapped_module.encoder._fsdp_wrapped_module.conv.weight", "encoder.conv.weight"),
        ("model.model.norm.weight", "model.norm.weight"),
        ("model._orig_mod.norm.weight", "model.norm.weight"),
        ("module.quantize.used", "quantize.used"),
        ("norm.weight", "norm.weight"),  # nothing is added
        ("module.stranger", "module.stranger"),
        ("my_module.decoder.weight", "my_module.decoder.weight"),
    ],
)
def test_segments_of_wrappers_are_removed_where_names_fit_then(name, fitting):
    assert names(name) == [fitting]


@pytest.mark.parametrize(
    "state",
    [
        ("decoder.weight", "module.decoder.weight"),
        ("model.decoder.weight", "module.decoder.weight"),
    ],
)
def test_names_that_would_collide_stay(state):
    assert names(*state) == list(state)


def wrapped(name):
    first, _, rest = name.partition(".")
    return f"model.{first}._orig_mod.{rest}"


def test_a_wrapped_checkpoint_converts_and_the_log_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    state = random_state(tiny.TINY)
    write_safetensors(tmp_path / "m", {wrapped(name): array for name, array in state.items()})
    with caplog.at_level(logging.INFO):
        source = conversion.open_source(tmp_path / "m", tiny_part(), tiny.TINY)
    codebook = source.arrays["pixel_codebook"].read()
    np.testing.assert_array_equal(codebook, state["quantize.embedding_vqgan.weight"])
    assert source.buffers.keys() == {"quantize.codebook_used"}
    assert f"{len(state)} names without the segments of wrappers" in caplog.text


def test_the_nearest_variant_is_named(tmp_path):
    state = random_state(tiny.TINY)
    del state["quant_conv.bias"]
    write_safetensors(tmp_path / "m", state)
    part = tiny_part()
    with pytest.raises(CheckpointMismatch) as caught:
        conversion.open_source(tmp_path / "m", part, part.variants["siglip"])
    assert "the nearest variant is clip, with 1 of them" in str(caught.value)
    assert str(tmp_path / "m") in str(caught.value) and len(str(caught.value)) < 2000
