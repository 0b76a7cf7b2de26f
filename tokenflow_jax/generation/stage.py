"""The generation stage: data, frozen tokenizer and evaluation around `train.Trainer.step`."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data import mixture, pipeline
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.captions.codes import CodeRecords, CodesError
from tokenflow_jax.data.captions.texts import CaptionConfig
from tokenflow_jax.data.stream_order import threads_for
from tokenflow_jax.data.text import PromptEncoder, PromptIds, llama2_ids, load_text_tokenizer
from tokenflow_jax.generation.drawing import Draws
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.generation.names import PART
from tokenflow_jax.generation.sample import Recipe, Sampler
from tokenflow_jax.generation.train import LossConfig, Trainer, TrainState
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import encoding
from tokenflow_jax.tokenizer.code_stage import CodeStage
from tokenflow_jax.tokenizer.frozen import encoder_params
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART as TOKENIZER
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train.stage import Program
from tokenflow_jax.weights import quantized

PyTree = Any


class GenerationStage(Draws, CodeStage):
    """Trains the model that draws pictures; its config is `configs/generation.py`."""

    name, part = "generation", PART
    headline = ("loss/total", "accuracy/codes")

    @functools.cached_property
    def prompts(self) -> PromptIds:
        """The ids around prompts; those of LLaMA-2 where no text tokenizer is named."""
        name, length = self.config.text_tokenizer, self.config.data.max_length
        if not name:
            return llama2_ids(length)
        return PromptEncoder(load_text_tokenizer(name), length)

    @functools.cached_property
    def model_config(self) -> GenerationConfig:
        """The model's hyper-parameters, completed by the tokenizers."""
        given = self.config.model.to_dict()
        return self.with_own_choices(complete_model(given, self.tokenizer_config, self.prompts))

    @property
    def own_ids(self) -> int:
        """The codes' ids, from code 0 on."""
        return self.model_config.image_start

    @property
    def beside_adapters(self) -> tuple[str, ...]:
        """What trains beside adapters: the codes' columns of the head are new, as norms may be."""
        head = "lm/embed" if self.model_config.lm.tied_head else "lm/head"
        tables = "level_embedding", "position_embedding", head
        return r"(\w+_)?projector", *tables, r"lm/.*norm\d?/scale"

    @functools.cached_property
    def model(self) -> Generation:
        """The generation model."""
        return self.adapted(Generation(self.model_config, self.dtype))

    @property
    def encodes(self) -> bool:
        """The step makes the codes of its images."""
        from_disk = {data.name == "codes" for _, data in self.data_sources.values()}
        if self.config.data.encode != "step":
            return False
        if len(from_disk) > 1:
            raise ValueError("data.mixture: pictures beside codes need --config.data.encode=once")
        return from_disk == {False}

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The training step's modules and options."""
        config, prompts = self.config, self.prompts
        return Trainer(
            model=self.model,
            losses=LossConfig(**config.losses),
            optimizer=self.optimizer,
            pad_id=prompts.pad_id,
            suffix=prompts.suffix,
            prefix_length=prompts.prefix_length,
            tokenizer=TokenFlow(self.tokenizer_config) if self.encodes else None,
            precision=self.encoder_precision,
            trainable=self.trainable,
            adapters=self.adapters,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            sources=self.sources,
            loss_tokens=config.loss_tokens,
        )

    def _frozen(self, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a tokenizer's parameters that the step reads."""
        if self.encodes:
            return {"tokenizer": encoder_params(tokenizer)}
        return {"tokenizer": Codebooks.of(tokenizer).params()}

    @property
    def frozen_shapes(self) -> PyTree:
        """Shapes of the frozen tokenizer, as far as the step reads it."""
        return self._frozen(TOKENIZER.template(self.tokenizer_config))

    @property
    def batch_shapes(self) -> PyTree:
        """Shapes of a global batch."""
        arrays = {"prefix": self.batch_array(jnp.int32, self.prompts.prefix_length)}
        if self.sources:
            arrays["source"] = self.batch_array(jnp.int32)
        if self.encodes:
            side = self.tokenizer_config.image_size
            return {**arrays, "image": self.batch_array(jnp.uint8, side, side, 3)}
        return {**arrays, "codes": self.batch_array(jnp.int32, self.model_config.pyramid.tokens)}

    def tokens_of(self, batch: PyTree) -> int:
        """Return the positions of a batch."""
        prompts, codes = self.prompts, self.model_config.pyramid.tokens
        return len(batch["prefix"]) * (prompts.prefix_length + codes + len(prompts.suffix))

    def sampling(self, images: int, weights_dtype: str = "") -> Program:
        """Return the sampler as a program: guided, one pass, prompts as long as they may be."""
        mesh.check_batch_size(images, self.mesh)
        length, rows = self.prompts.prefix_length, self.batch_sharding
        whole = mesh.replicated(self.mesh)
        model = quantized.model_of(Generation(self.model_config, self.dtype), weights_dtype)
        held = quantized.shapes_of(model, self.dtype)
        codebooks = Codebooks.of(TOKENIZER.template(self.tokenizer_config)).params()
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
        parts = {
            "parameters": mesh.placed(held, self.mesh),
            "codebooks": mesh.placed(codebooks, self.mesh),
            "prompts": (
                jax.ShapeDtypeStruct((images, length), jnp.int32, sharding=rows),
                jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows),
                jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
            ),
        }
        passes = tuple(map(tuple, self.config.sampling.passes))
        function = Sampler(model, self.prompts.pad_id, passes)
        arguments = (parts["parameters"], Codebooks.of(parts["codebooks"]), *parts["prompts"])
        return Program(function, jax.jit(function), arguments, parts)

    def open(self) -> "GenerationStage":
        """Load the tokenizer, open the data and make its codes unless the step does."""
        config = self.config
        self.check_sources("FOLDER of LLaMA-2 (its tokenizer files), or 'bytes' or 'words'")
        self._recipe = Recipe(**config.sampling)
        self._recipe.check(self.model_config)
        self.open_tokenizer()
        self.frozen = self.place(self._frozen(self.tokenizer_arrays), self.frozen_shapes)
        self._encode = functools.cache(lambda: encoding.image_encoder(self.tokenizer))
        sources = [data for _, data in self.data_sources.values()]
        # All are opened before the first is encoded: a wrong path is an error at once.
        train_sets = [self._examples(data, data.split) for data in sources]
        eval_set = self._examples(sources[0], sources[0].eval_split)
        self._train_sets = [self._as_read(examples) for examples in train_sets]
        self._captions = [CaptionConfig(d.captions, d.drop_rate) for d in sources]
        self._eval_set = self._as_read(eval_set)
        self.notes += [
            f"image tokenizer {config.tokenizer.path}, fingerprint {config.tokenizer.fingerprint}; "
            f"text tokenizer {config.text_tokenizer}, {config.data.max_length} ids per prompt",
            *mesh.describe_whole(self.state_shapes, self.mesh),
        ]
        return self

    def _examples(self, data: Any, split: str) -> captions.Examples:
        """Open a split, codes or pictures."""
        if data.name == "codes":
            try:
                return CodeRecords(data.path, split, self.tokenizer_identity)
            except CodesError as error:
                raise CodesError(f"data.path: {error}") from error
        size = self.tokenizer_config.image_size
        config = mixture.from_settings(
            *(pipeline.DataConfig, data), split=split, image_size=size, augment="center", flip=False
        )
        return captions.Pictures(config)

    def _as_read(self, examples: captions.Examples) -> captions.Examples:
        """Make the codes of pictures, unless the step does."""
        if self.encodes or isinstance(examples, CodeRecords):
            return examples
        return encoding.encode_in_memory(self._encode(), examples, self.config.eval.batch_size)

    @property
    def data_set(self) -> Any:
        """The opened training data."""
        return self._train_sets[0]

    def data(self) -> Any:
        """Return this process's share of the training batches."""
        share, shares = mesh.batch_share(self.mesh, self.config.batch_size)
        paths = [data.path for _, data in self.data_sources.values()]
        options = {
            "batch_size": self.config.batch_size // shares,
            "seed": self.config.seed,
            "shard_index": share,
            "shard_count": shares,
            "shuffle_block": self.config.data.shuffle_block,
            "shuffle_window": self.config.data.shuffle_window,
            "threads": threads_for(self.config.data.threads, *paths),
        }
        sets = zip(self._train_sets, self._captions, strict=True)
        if self.sources:
            weights = [weight for weight, _ in self.data_sources.values()]
            named = dict(zip(self.sources, sets, strict=True))
            return captions.mixed_batches(named, weights, self.prompts, **options)
        return captions.train_batches(*next(sets), self.prompts, **options)

    def final_notes(self) -> list[str]:
        """Return lines about skipped pictures and prompts that were cut."""
        notes = captions.skipped_notes(*self._train_sets, self._eval_set)
        return [*notes, *self.prompts.cut_notes()]

    @functools.cached_property
    def _held_out_sums(self):
        """Compiled (weights, frozen, batch) -> sums of rows' losses and accuracies, and rows."""
        trainer = self.trainer

        def sums(params, frozen, batch):
            codes_BN = trainer.codes(frozen, batch)
            found = trainer.token_losses(params, frozen, batch["prefix"], codes_BN)
            right_BN = found.image_right[:, : codes_BN.shape[1]]
            rows = (found.image.mean(axis=1), right_BN.mean(axis=1), 1.0)
            return jnp.stack([jnp.sum(jnp.where(batch["mask"], row, 0)) for row in rows])

        return mesh.bind(self.mesh, jax.jit(sums, out_shardings=mesh.replicated(self.mesh)))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return the held-out loss; at the end also how often drawn pictures are recognized."""
        weights, sums, options = self.weights(state), np.zeros(3), self.config.eval
        share, shares = mesh.batch_share(self.mesh, self.eval_rows)
        batches = captions.eval_batches(
            self._eval_set,
            self.prompts,
            batch_size=self.eval_rows // shares,
            limit=options.examples or None,
            shard_index=share,
            shard_count=shares,
        )
        for batch in batches:
            rows = {
                name: jax.make_array_from_process_local_data(self.batch_sharding, batch[name])
                for name in ("prefix", "mask", self._eval_set.array)
            }
            sums += np.asarray(self._held_out_sums(weights, self.frozen, rows))
            self.between_batches()
        figures = {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2], "images": sums[2]}
        if int(state.step) == self.config.total_steps and options.retrieval:
            sets = {"trained": self._train_sets[0], "unseen": self._eval_set}
            figures |= self.recognized(weights, sets)
        return {name: float(value) for name, value in figures.items()}

    def visualize(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """Return grids of fixed prompts: the pictures, and how they grow scale by scale."""
        return self.drawings(self.weights(state))


def complete_model(
    given: dict[str, Any], tokenizer: TokenizerConfig, prompts: PromptIds
) -> dict[str, Any]:
    """Fill in what the tokenizers decide: fields of `GenerationConfig` that are empty or 0.

    Raises:
      ValueError: values that differ from what the tokenizers decide, all of them.
    """
    decided = {
        "scales": tuple(tokenizer.scales),
        "codebook_size": tokenizer.codebook_size,
        "code_channels": tokenizer.code_channels,
        "image_start": prompts.image_start,
    }
    size = prompts.image_start + tokenizer.codebook_size
    problems = []
    for name, value in decided.items():
        own = tuple(given[name]) if name == "scales" else given[name]
        if own and own != value:
            problems.append(f"model.{name} is {own}, the tokenizers have {value}")
    rows = given["lm"]["vocabulary_size"] or size
    if rows < size:
        problems.append(f"model.lm.vocabulary_size {rows} does not hold {size} ids")
    if problems:
        raise ValueError("; ".join(problems) + " (0 or () takes the tokenizers' values)")
    return {**given, **decided, "lm": {**given["lm"], "vocabulary_size": rows}}
