"""The generation model of a `t2i_*` case: config, parameters, codebooks and stored results."""

import functools
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from golden import weights
from golden.loading import GOLDEN, manifest

from tokenflow_jax.generation.model import GenerationConfig
from tokenflow_jax.generation.names import generation_table, generation_template
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.language_model import config_from_json


class Case(NamedTuple):
    """A case.

    Attributes:
      config, params, codebooks: the model and the tokenizer's codebooks.
      state: the same weights by PyTorch's names.
      about: config.json.
    """

    config: GenerationConfig
    params: dict[str, Any]
    codebooks: Codebooks
    state: dict[str, np.ndarray]
    about: dict[str, Any]

    @property
    def pad_id(self) -> int:
        return self.about["pad_token_id"]


@functools.cache
def load(name: str) -> Case:
    """Builds the case "s3", "s4" or "s9"."""
    about = json.loads((GOLDEN / f"t2i_{name}.config.json").read_text())
    lm = config_from_json({"model_type": "llama", **about["llm"]})
    config = GenerationConfig(
        lm={**vars(lm), "norms": "after", "qk_norm": True},
        scales=about["scales"],
        codebook_size=about["codebook_size"],
        image_start=about["image_token_start"],
    )
    seed = about["seed"]
    state = weights.state_dict(manifest(f"t2i_{name}"), seed)
    books = weights.state_dict(manifest(f"t2i_{name}.tokenizer"), seed)
    halves = (books[f"quantize.embedding_{kind}.weight"] for kind in ("vqkd", "vqgan"))
    params = rules.to_flax(state, generation_table(config), generation_template(config))
    return Case(config, {"params": params}, Codebooks(*map(jnp.asarray, halves)), state, about)


def stored(name: str, kind: str) -> dict[str, np.ndarray]:
    """The arrays of "train", "features" or "generate"."""
    with np.load(GOLDEN / f"t2i_{name}.{kind}.npz") as file:
        return {key: file[key] for key in file.files}
