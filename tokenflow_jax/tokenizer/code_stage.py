"""The base of the language models' stages: a frozen tokenizer turns their images into codes."""

import dataclasses
import functools
import os
from typing import Any

import jax
import ml_collections
import optax

from tokenflow_jax.data import mixture
from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import fingerprint, frozen
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.train import optim
from tokenflow_jax.train.stage import Stage, State
from tokenflow_jax.weights import start
from tokenflow_jax.weights.lora import Adapters, LoraConfig
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import unflatten

PyTree = Any
ENCODE = ("once", "step")
_OF_A_RUN = ("remat", "attention")  # fields of LMConfig that another run of the model may change


class CodeStage(Stage):
    """A stage whose model reads or writes the codes of a frozen tokenizer.

    Attributes:
      part: the model, as the stage's `names` describe it.
      own_ids: ids of the vocabulary from there on are no language model's; None: it has none.
      beside_adapters: patterns of what trains beside LoRA's adapters, unless config.trainable says.
    """

    part: Part
    own_ids: int | None = None
    beside_adapters: tuple[str, ...] = ("projector",)
    frozen_name = "frozen tokenizer"

    def __init__(self, config: Any, mesh: mesh.Mesh, platform: str | None = None):
        super().__init__(config, mesh, platform)
        if config.data.encode not in ENCODE:
            raise ValueError(f"data.encode {config.data.encode!r} is not one of {ENCODE}")
        if config.tokenizer.precision not in frozen.PRECISIONS:
            raise ValueError(
                f"tokenizer.precision {config.tokenizer.precision!r} is not one of "
                f"{frozen.PRECISIONS}"
            )
        if config.loss_tokens < 1:
            raise ValueError(f"loss_tokens {config.loss_tokens} must be at least 1")

    @functools.cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """The frozen tokenizer's hyper-parameters."""
        config = frozen.find_config(self.config.tokenizer)
        frozen.check_shared_index(config, self.config.tokenizer.path)
        return config

    @property
    def encoder_precision(self) -> str:
        """Precision of the tokenizer's encoders in the step."""
        precision = self.config.tokenizer.precision
        if precision == "auto":
            precision = "high" if self.platform == "tpu" else "highest"
        return precision

    @functools.cached_property
    def data_sources(self) -> dict[str, tuple[float, Any]]:
        """Weight and settings of each source of the data; see `data.mixture.settings`."""
        return mixture.settings(self.config.data)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of a mixture; () without one."""
        return tuple(filter(None, self.data_sources))

    def with_own_choices(self, fields: dict[str, Any]) -> Any:
        """Return the model's hyper-parameters, the run's own choices for the decoder included."""
        own = {name: self.config[name] for name in _OF_A_RUN}
        return self.part.config_class(**{**fields, "lm": LMConfig(**{**fields["lm"], **own})})

    @functools.cached_property
    def adapters(self) -> Adapters | None:
        """LoRA's adapters; None without."""
        options = LoraConfig(**self.config.get("lora", {}))
        if not options.rank:
            return None
        patterns = tuple(self.config.trainable) or self.beside_adapters
        return Adapters(options, patterns, self.dtype)

    def adapted(self, model: Any) -> Any:
        """Return the stage's model, with adapters if there are any."""
        return self.adapters.model(model) if self.adapters else model

    @functools.cached_property
    def trainable(self) -> PyTree | None:
        """Marks of the parameters that train; None when all do, or with adapters."""
        return None if self.adapters else super().trainable

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the parameters that train."""
        options = optim.OptimizerConfig(**self.config.optimizer)
        return optim.make_optimizer(options, self.config.total_steps, self.trainable)

    @property
    def parameters(self) -> PyTree:
        """Shapes of the model's parameters."""
        if not self.adapters:
            return self.part.template(self.model_config)
        key = jax.random.key(0)
        return jax.eval_shape(lambda key: self.adapters.init(self.model, key), key)

    @property
    def eval_rows(self) -> int:
        """Rows of a batch of evaluation: the config's, or a few more that the devices can share."""
        size = self.config.eval.batch_size
        return size + -size % mesh.batch_parts(self.mesh)

    def init(self) -> State:
        """Return the state from scratch, sharded; adapters need weights to begin with."""
        if self.adapters and not self.config.init_from:
            raise ValueError(
                f"config.lora.rank={self.adapters.config.rank} adapts a trained model: name it, "
                "--config.init_from= (a language model or a run), or train all with a rank of 0"
            )
        if not self.config.init_from:
            return super().init()
        brought = self.brought

        def state(key: jax.Array) -> State:
            # Random numbers that are replaced would take time, and up to three times the memory.
            params = start.blanked(self.trainer.init(key).params, brought)
            return self.trainer.init(key, params)

        return self._first_state(state)

    @property
    def brought(self) -> PyTree:
        """Marks of the parameters that config.init_from replaces wholly."""
        return start.brought(self.config.init_from, self.parameters, self.own_ids)

    def averaged(self, params: PyTree) -> PyTree:
        return self.adapters.take(params) if self.adapters else params

    def weights(self, state: State) -> PyTree:
        """Return the weights to evaluate: the moving average where there is one."""
        weights = super().weights(state)
        if not self.adapters:
            return weights
        return self.adapters.join(state.params, self.adapters.take(weights))

    def load_parameters(self, params: PyTree) -> tuple[PyTree, str]:
        """Return the weights of config.init_from: a language model or a model of this stage."""
        places = mesh.shardings(params, self.mesh)
        path, config = self.config.init_from, self.model_config
        return start.load_model(path, self.part, config, params, places, self.own_ids)

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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The opened tokenizer, whole on the default device."""
        return Tokenizer.of(*self._tokenizer_source)

    def open_tokenizer(self) -> None:
        """Open the tokenizer; fill in what a checkpoint must know of it and of the model.

        Raises:
          ValueError: there is no tokenizer, or not the one that config.tokenizer.fingerprint names.
        """
        config = self.config
        path, source = frozen.open_weights(config.tokenizer.path, config.tokenizer.variant or None)
        self.tokenizer_arrays = unflatten(source.arrays)
        self._tokenizer_source = path, source
        identity = self.tokenizer_identity = fingerprint.identity(source.config, source.arrays)
        if config.tokenizer.fingerprint:
            known = {"fingerprint": config.tokenizer.fingerprint}
            check_tokenizer("config.tokenizer.fingerprint", known, identity)
        model = dataclasses.asdict(self.model_config)
        for name in _OF_A_RUN:
            model["lm"].pop(name)
        with config.unlocked():
            config.model = ml_collections.ConfigDict(model)
            config.tokenizer.fingerprint = identity["fingerprint"]
            path = config.tokenizer.path  # as given, and from anywhere
            config.tokenizer.absolute_path = path if "://" in path else os.path.abspath(path)
