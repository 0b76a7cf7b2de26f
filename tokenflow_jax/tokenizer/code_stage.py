"""What the stages of language models share: a frozen tokenizer that makes codes of the images."""

import dataclasses
import functools
from typing import Any

import ml_collections

from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import frozen
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.train.stage import Stage

ENCODE = ("once", "step")
_OF_A_RUN = ("remat", "attention")  # fields of LMConfig that another run of the model may change


class CodeStage(Stage):
    """A stage whose model reads or writes the codes of a frozen tokenizer.

    Attributes:
      tokenizer: set by `open_tokenizer`.
    """

    tokenizer: Tokenizer

    def __init__(self, config: Any, mesh: mesh.Mesh, platform: str | None = None):
        super().__init__(config, mesh, platform)
        if config.data.encode not in ENCODE:
            raise ValueError(f"data.encode {config.data.encode!r} is not one of {ENCODE}")
        if config.loss_tokens < 1:
            raise ValueError(f"loss_tokens {config.loss_tokens} must be at least 1")

    @functools.cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """The frozen tokenizer's hyper-parameters."""
        return frozen.find_config(self.config.tokenizer)

    def language_model(self, fields: dict[str, Any]) -> LMConfig:
        """Return the decoder's hyper-parameters, the run's own choices included."""
        own = {name: self.config[name] for name in _OF_A_RUN}
        return dataclasses.replace(LMConfig(**fields), **own)

    def check_sources(self, text_tokenizers: str) -> None:
        """Raise ValueError that lists everything a run still has to be given."""
        config, problems = self.config, []
        if not config.tokenizer.path:
            problems.append(
                "this variant needs a trained image tokenizer: --config.tokenizer.path=, a workdir "
                "or a PyTorch file (with --config.tokenizer.variant=)"
            )
        if not config.text_tokenizer:
            problems.append(
                f"this variant needs a text tokenizer: --config.text_tokenizer={text_tokenizers}"
            )
        if config.data.name == "jsonl" and not config.data.path:
            problems.append("data.path must name the .jsonl file")
        if problems:
            raise ValueError("; ".join(problems))

    def open_tokenizer(self, model_config: Any) -> None:
        """Load the tokenizer; fill in what a checkpoint must know of it and of the model.

        Raises:
          ValueError: there is no tokenizer, or not the one that config.tokenizer.fingerprint names.
        """
        config = self.config
        self.tokenizer = Tokenizer.load(config.tokenizer.path, config.tokenizer.variant or None)
        identity = self.tokenizer.identity
        if config.tokenizer.fingerprint:
            known = {"fingerprint": config.tokenizer.fingerprint}
            check_tokenizer("config.tokenizer.fingerprint", known, identity)
        model = dataclasses.asdict(model_config)
        for name in _OF_A_RUN:
            model["lm"].pop(name)
        with config.unlocked():
            config.model = ml_collections.ConfigDict(model)
            config.tokenizer.fingerprint = identity["fingerprint"]
