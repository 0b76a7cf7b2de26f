"""Serialized StableHLO programs are read again and give the tokenizer's codes."""

import jax
import numpy as np
import pytest
import tiny

import tokenflow_jax as tfx
from tokenflow_jax.export import programs, stablehlo

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def tokenizer():
    return tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 0))


def test_programs_of_any_batch_for_all_platforms(tokenizer):
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    codes_BL = np.asarray(tokenizer.encode(images_BHWC))
    encode, decode, _ = (
        jax.export.deserialize(stablehlo.convert(program))
        for program in programs.programs(tokenizer)
    )
    assert encode.platforms == decode.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 3):
        assert np.array_equal(encode.call(images_BHWC[:batch]), codes_BL[:batch])
    np.testing.assert_allclose(decode.call(codes_BL), tokenizer.decode(codes_BL), rtol=0, atol=1e-5)
