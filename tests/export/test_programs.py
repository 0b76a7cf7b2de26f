"""Exported programs do what the tokenizer does, any number of scales included."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import tokenflow_jax as tfx
from tokenflow_jax.export import programs
from tokenflow_jax.tokenizer.kinds import QuantizerConfig

HEADS = dataclasses.replace(tiny.TINY, quantizer=QuantizerConfig(heads=3))


def tokenizer_of(config):
    return tfx.Tokenizer(config, tiny.random_params(config, 0))


@pytest.mark.parametrize("config", [tiny.TINY, HEADS], ids=["one", "heads"])
def test_codes_of_some_scales(config):
    tokenizer = tokenizer_of(config)
    _, decode, features = (jax.jit(program.function) for program in programs.programs(tokenizer))
    rng = np.random.default_rng(0)
    codes_BL = rng.integers(0, config.codebook_size, (2, config.length), np.int32)
    for tokens in (5, 21):
        first_BL = codes_BL[:, : tokens * config.quantizer.heads]
        rest = ((0, 0), (0, config.length - first_BL.shape[1]))
        padded_BL = np.pad(first_BL, rest, constant_values=-1)
        np.testing.assert_allclose(
            features(padded_BL), tokenizer.features(first_BL), rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(decode(padded_BL), tokenizer.decode(first_BL), rtol=0, atol=1e-5)


def test_the_description_is_json_as_text():
    text = programs.as_text(programs.describe(tokenizer_of(tiny.TINY), None))
    assert text["scales"] == "[1, 2, 4]" and text["codes_per_image"] == "21"
    assert text["batch_size"] == "null" and text["images"].startswith("uint8 (B, 16, 16, 3)")
