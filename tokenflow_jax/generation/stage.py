"""Wires the generation model's training step to the loop: data, frozen tokenizer, evaluation.

The method itself is in `generation.train`; here is what surrounds it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokenflow_jax.data import pipeline
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.captions.codes import CodeRecords, CodesError, check_tokenizer
from tokenflow_jax.data.text import PromptEncoder
from tokenflow_jax.evals import pictures
from tokenflow_jax.generation import api as generator
from tokenflow_jax.generation import retrieval
from tokenflow_jax.generation import start as generation_start
from tokenflow_jax.generation.program import Program
from tokenflow_jax.generation.train import TrainState
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import api, encoding
from tokenflow_jax.train.loop import Stage

PyTree = Any


def make_stage(config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh) -> Stage:
    """Builds the generation stage from a config such as `configs/generation.py`.

    What the tokenizers decide (see `generation_program.complete_model`) and the image tokenizer's
    fingerprint are filled into the config, so that a checkpoint says all about itself.

    Args:
      config: see the comments there.
      device_mesh: of `mesh.make_mesh`.

    Returns:
      What `loop.train_and_evaluate` needs.

    Raises:
      ValueError: bad values, or files that the config names and that do not exist or fit.
    """
    return _GenerationStage(config, device_mesh).stage()


class _GenerationStage:
    """The functions of the stage; holds what they share."""

    def __init__(self, config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, device_mesh
        if not config.text.tokenizer:
            raise ValueError(
                "this variant needs a text tokenizer: --config.text.tokenizer=FOLDER of LLaMA-2 "
                "(its tokenizer files), or 'bytes' or 'words'"
            )
        if not config.tokenizer.path:
            raise ValueError(
                "this variant needs a trained image tokenizer: --config.tokenizer.path=, a workdir "
                "or a PyTorch file (with --config.tokenizer.variant=)"
            )
        self.program = Program(config, device_mesh, jax.default_backend())
        self.prompts: PromptEncoder = self.program.prompts
        self.captions = captions.CaptionConfig(config.data.captions, config.data.drop_rate)
        self.recipe = generator.Recipe(**config.sampling)
        self.recipe.check(self.program.model_config)
        self.tokenizer = api.Tokenizer.load(config.tokenizer.path, config.tokenizer.variant or None)
        self._fill_in()
        parts = self.program.frozen_parts(self.tokenizer.params)
        frozen = {"tokenizer": parts}
        self.frozen = jax.device_put(frozen, mesh.shardings(frozen, device_mesh))
        self.train_set = self._examples(config.data.split)
        self.eval_set = self._examples(config.data.eval_split)
        self.notes = [
            f"image tokenizer {config.tokenizer.path}, fingerprint {self.tokenizer.fingerprint}; "
            f"text tokenizer {config.text.tokenizer}, {config.text.budget} ids per prompt",
            *mesh.describe_whole(self.program.state, device_mesh),
        ]

    def _fill_in(self) -> None:
        """Puts into the config what a checkpoint has to know of the tokenizers."""
        config, identity = self.config, self.tokenizer.identity
        if config.data.fingerprint:
            check_tokenizer("this run's data", {"fingerprint": config.data.fingerprint}, identity)
        model = dataclasses.asdict(self.program.model_config)
        # These two are choices of a run, not of the model: another run may take others.
        for name in ("remat", "attention"):
            model["lm"].pop(name)
        with config.unlocked():
            config.model = ml_collections.ConfigDict(model)
            config.data.fingerprint = identity["fingerprint"]

    def _examples(self, split: str) -> captions.Examples:
        """A part of the data: codes from disk or memory, or pictures for the step to encode."""
        data = self.config.data
        if data.name == "codes":
            try:
                return CodeRecords(data.path, split, self.tokenizer.identity)
            except CodesError as error:
                raise CodesError(f"data.path: {error}") from error
        pictures = captions.Pictures(
            pipeline.DataConfig(
                name=data.name,
                path=data.path,
                split=split,
                image_size=self.tokenizer.config.image_size,
                augment="center",
                flip=False,
                image_folder=data.image_folder,
            )
        )
        if self.program.encodes:
            return pictures
        return encoding.encode_in_memory(self._encode, pictures, self.config.eval.batch_size)

    @functools.cached_property
    def _encode(self):
        """Compiled: uint8 images to codes."""
        return encoding.image_encoder(self.tokenizer)

    def stage(self) -> Stage:
        """Returns the assembled stage."""
        return Stage(
            name="generation",
            init=self.init,
            warm_start=self.warm_start if self.config.init_from else None,
            step=mesh.bind(self.mesh, self.program.step),
            frozen=self.frozen,
            train_data=self.train_data,
            batch_sharding=mesh.batch_sharding(self.mesh),
            evaluate=self.evaluate,
            visualize=self.visualize,
            images_per_step=self.config.batch_size,
            notes=self.notes,
            final_notes=self.final_notes,
            headline=("loss/total", "accuracy/codes"),
        )

    def final_notes(self) -> list[str]:
        """What was left out, and which prompts were too long."""
        notes = captions.skipped_notes(self.train_set, self.eval_set)
        return [*notes, *self.prompts.cut_notes()]

    def train_data(self) -> Any:
        """This process's share of the training data, infinite."""
        share, shares = mesh.batch_share(self.mesh, self.config.batch_size)
        return captions.train_batches(
            self.train_set,
            self.captions,
            self.prompts,
            batch_size=self.config.batch_size // shares,
            seed=self.config.seed,
            shard_index=share,
            shard_count=shares,
        )

    def init(self) -> TrainState:
        """The state from scratch: random weights."""
        shardings = jax.tree.map(lambda x: x.sharding, self.program.state)
        init = jax.jit(self.program.trainer.init, out_shardings=shardings)
        return init(jax.random.key(self.config.seed))

    def warm_start(self, state: TrainState) -> tuple[TrainState, str]:
        """Takes the weights of config.init_from: a language model or a generation model."""
        source = self.config.init_from
        params, text = generation_start.start_from(
            source, state.params, self.program.model_config, mesh.shardings(state.params, self.mesh)
        )
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, ema=ema), text

    def _weights(self, state: TrainState) -> PyTree:
        """The weights that are evaluated, spread as they are: no device may hold all of them."""
        return state.params if state.ema is None else state.ema

    @functools.cached_property
    def _held_out_sums(self):
        """Compiled (weights, frozen, batch) -> sums of rows' losses and accuracies, and rows."""
        trainer = self.program.trainer

        def sums(params, frozen, batch):
            codes_BN = trainer.codes(frozen, batch)
            found = trainer.token_losses(params, frozen, batch["prefix"], codes_BN)
            right_BN = found.image_right[:, : codes_BN.shape[1]]
            rows = (found.image.mean(axis=1), right_BN.mean(axis=1), 1.0)
            return jnp.stack([jnp.sum(jnp.where(batch["mask"], row, 0)) for row in rows])

        return mesh.bind(self.mesh, jax.jit(sums, out_shardings=mesh.replicated(self.mesh)))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out loss; at the end also whether pictures can be told from their captions."""
        weights, sums = self._weights(state), np.zeros(3)
        size = self.config.eval.batch_size
        size += -size % mesh.batch_parts(self.mesh)
        share, shares = mesh.batch_share(self.mesh, size)
        batches = captions.eval_batches(
            self.eval_set,
            self.prompts,
            batch_size=size // shares,
            limit=self.config.eval.images or None,
            shard_index=share,
            shard_count=shares,
        )
        sharding = mesh.batch_sharding(self.mesh)
        for batch in batches:
            rows = {
                name: jax.make_array_from_process_local_data(sharding, batch[name])
                for name in ("prefix", "mask", self.eval_set.array)
            }
            sums += np.asarray(self._held_out_sums(weights, self.frozen, rows))
        figures = {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2], "images": sums[2]}
        if int(state.step) == self.config.total_steps and self.config.eval.retrieval:
            figures |= self._retrieval(weights)
        return {name: float(value) for name, value in figures.items()}

    def _retrieval(self, params: PyTree) -> dict[str, float]:
        """How often the picture drawn for a caption is nearest to that caption's own picture."""
        options, figures = self.config.eval, {}
        for name, examples in (("trained", self.train_set), ("unseen", self.eval_set)):
            found = retrieval.caption_retrieval(
                self._drawing(params),
                self.recipe,
                examples,
                count=options.retrieval,
                batch_size=options.sample_batch,
            )
            figures |= {f"{kind}_{name}": value for kind, value in found.items()}
        return figures

    def _drawing(self, params: PyTree) -> generator.Generator:
        """A generator with some weights; all of them share what is compiled."""
        return self._any_generator.with_params(params)

    @functools.cached_property
    def _any_generator(self) -> generator.Generator:
        return generator.Generator(
            self.program.model_config,
            {},
            self.tokenizer,
            self.prompts,
            self.recipe,
            str(self.program.dtype),
            device_mesh=self.mesh,
        )

    def visualize(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """Grids: fixed prompts, and how their pictures grow scale by scale."""
        drawn = self._drawing(self._weights(state))
        prompts = list(self.config.eval.prompts)
        codes = drawn.codes(prompts, [0] * len(prompts), self.recipe, self.config.eval.sample_batch)
        growing = list(drawn.previews(codes))
        return {
            "samples": pictures.grid([growing[-1]]),
            "scales": pictures.grid(growing),
        }
