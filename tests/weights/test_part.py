"""The registry of stages and the parts that it hands to the converter."""

import subprocess
import sys

import pytest
from tiny import TINY
from torch_states import tiny_part

from tokenflow_jax import stages


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_stage_has_a_part(stage):
    part = stages.part(stage)
    assert part.stage == stage
    name, config = next(iter(part.variants.items()))
    assert isinstance(config, part.config_class) and part.describe(config) == f"variant {name!r}"


def test_an_unknown_stage_lists_the_stages():
    with pytest.raises(
        ValueError, match="'lm'; the stages available are: generation, tokenizer, understanding"
    ):
        stages.part("lm")


def test_a_config_without_a_name_is_described_in_full():
    assert stages.part("tokenizer").describe(TINY) == str(TINY)
    assert tiny_part().describe(TINY) == "variant 'clip'"


def test_light_imports_stay_light():
    """The registry needs no JAX, and language models need gguf only where a file is read."""
    code = (
        "import sys\n"
        "import tokenflow_jax.stages\n"
        "assert 'jax' not in sys.modules\n"
        "import tokenflow_jax.weights.language_model\n"
        "heavy = {'gguf', 'torch', 'transformers', 'tokenflow_jax.tokenizer.model'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
