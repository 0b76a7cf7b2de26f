"""The understanding stage: data, features and evaluation around `train.Trainer.step`."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data import mixture
from tokenflow_jax.data.chat import batches
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.mixed import MixedConversations
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.code_stage import CodeStage
from tokenflow_jax.tokenizer.frozen import encoder_params
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.names import PART as TOKENIZER
from tokenflow_jax.understanding.answer import Decoding, answer
from tokenflow_jax.understanding.complete import complete_model
from tokenflow_jax.understanding.held_out import HeldOutQuestions
from tokenflow_jax.understanding.model import (
    Understanding,
    UnderstandingConfig,
    vectors_per_image,
)
from tokenflow_jax.understanding.names import PART
from tokenflow_jax.understanding.train import Trainer, TrainState

PyTree = Any


class UnderstandingStage(CodeStage):
    """Trains the model that reads pictures; its config is `configs/understanding.py`.

    Attributes:
      images: rows of the table of features; 0 when pictures are tokenized in the step.
    """

    name, part = "understanding", PART
    headline = ("loss/total", "accuracy/answers")
    drawn: Drawn | None = None  # the model only reads
    images = 0  # known when `open` has made the table; preflight compiles the tokenizer in the step

    @functools.cached_property
    def model_config(self) -> UnderstandingConfig:
        """The model's hyper-parameters, completed by the tokenizers."""
        given, text_tokenizer = self.config.model.to_dict(), self.config.text_tokenizer
        return self.with_own_choices(complete_model(given, self.tokenizer_config, text_tokenizer))

    @property
    def vectors(self) -> int:
        """Vectors of an image."""
        return vectors_per_image(self.tokenizer_config.pyramid, self.model_config.strategy)

    @functools.cached_property
    def model(self) -> Understanding:
        """The understanding model."""
        return self.adapted(Understanding(self.model_config, self.dtype))

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The training step's modules and options."""
        return Trainer(
            model=self.model,
            tokenizer=TokenFlow(self.tokenizer_config),
            optimizer=self.optimizer,
            precision=self.encoder_precision,
            trainable=self.trainable,
            adapters=self.adapters,
            accumulate=self.config.accumulate,
            loss_tokens=self.config.loss_tokens,
            sources=self.sources,
        )

    @property
    def frozen_shapes(self) -> PyTree:
        """Shapes of the table of features, or of the frozen tokenizer's encoders."""
        if self.images:
            shape = (self.images, self.vectors, self.model_config.vision_channels)
            return {"features": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return {"tokenizer": encoder_params(TOKENIZER.template(self.tokenizer_config))}

    @property
    def batch_shapes(self) -> PyTree:
        """Shapes of a global batch of the longest rows."""
        names, length = ("ids", "labels", "places", "segments"), self.config.data.max_length
        shapes = {name: self.batch_array(jnp.int32, self.pack * length) for name in names}
        if self.sources:
            shapes["source"] = self.batch_array(jnp.int32, self.pack)
        if self.images:
            return shapes | {"image_index": self.batch_array(jnp.int32, self.pack)}
        side = self.tokenizer_config.image_size
        return shapes | {"image": self.batch_array(jnp.uint8, self.pack, side, side, 3)}

    @property
    def made_once(self) -> Callable[[PyTree, jax.Array], jax.Array]:
        """The function of the tokenizer and of images whose results can be kept."""
        return self.trainer.image_features

    def tokens_of(self, batch: PyTree) -> int:
        """Return the positions of a batch."""
        return batch["ids"].size

    def all_shapes(self, batch: PyTree) -> list[PyTree]:
        """Return the shapes of batches: one for each length of rows."""
        (given,) = super().all_shapes(batch)
        tokens = ("ids", "labels", "places", "segments")
        return [
            given | {name: self.batch_array(given[name].dtype, length) for name in tokens}
            for length in self._train_set.config.row_lengths
        ]

    def open(self) -> "UnderstandingStage":
        """Load the tokenizer, open the conversations, make the tables of features."""
        config = self.config
        self.check_sources("FOLDER of the language model, or 'bytes'")
        self.open_tokenizer()
        sets = [
            Conversations(self._data_config(data, data.split))
            for _, data in self.data_sources.values()
        ]
        weights = [weight for weight, _ in self.data_sources.values()]
        mixed = dict(zip(self.sources, sets, strict=False))
        self._train_set = MixedConversations(mixed, weights) if mixed else sets[0]
        _, first = next(iter(self.data_sources.values()))
        held_out = self._data_config(first, first.eval_split, held_out=True)
        self._eval_set = Conversations(held_out, config.eval.examples or None)
        batches.check_usable(self._train_set)
        arrays = {"tokenizer": encoder_params(self.tokenizer_arrays)}
        self.frozen = self.place(arrays, self.frozen_shapes)
        encoder = self.frozen["tokenizer"]
        if config.data.encode == "once":
            table = self._table(encoder, self._train_set)
            self.images = len(table)
            self.frozen = self.place(self._with_table(table), self.frozen_shapes)
        # Held-out pictures are few: their features are made once, whatever the training does.
        self._eval_table = self._table(encoder, self._eval_set)
        self._questions = self._questions_about(self._eval_table)
        self.notes += [
            f"image tokenizer {config.tokenizer.path}, fingerprint {config.tokenizer.fingerprint}; "
            f"{self.vectors} vectors of {self.model_config.vision_channels} channels per "
            f"image ({self.model_config.strategy}); text tokenizer {config.text_tokenizer}",
            f"{len(self._train_set)} conversations for training, {len(self._eval_set)} held out",
            *mesh.describe_whole(self.state_shapes, self.mesh),
        ]
        return self

    def _data_config(self, data: Any, split: str, held_out: bool = False) -> ConversationConfig:
        return mixture.from_settings(
            ConversationConfig,
            data,
            path=data.eval_path if held_out and data.eval_path else data.path,
            split=split,
            questions=tuple(self.config.eval.questions if held_out else data.questions),
            together=data.together and not held_out,
            system=data.system if data.own_system else None,
            text_tokenizer=self.config.text_tokenizer,
            image_size=self.tokenizer_config.image_size,
            vectors=self.vectors,
            pack=1 if held_out else self.pack,
            drawn=self.drawn,
        )

    def _with_table(self, table: np.ndarray) -> PyTree:
        """Return what the step reads in place of the tokenizer."""
        return {"features": table}

    def _questions_about(self, table: np.ndarray) -> HeldOutQuestions:
        """Return the held-out questions, for pictures of a table."""
        return HeldOutQuestions(self._eval_set, table)

    def _compiled(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Jit a function whose results every device gets whole."""
        jitted = jax.jit(function, out_shardings=mesh.replicated(self.mesh))
        return mesh.bind(self.mesh, jitted)

    def _global(self, tree: PyTree) -> PyTree:
        """Split NumPy arrays that are the same in all processes over the devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self.batch_sharding, lambda i: x[i]),
            tree,
        )

    def _table(self, encoder: PyTree, data: Conversations) -> np.ndarray:
        """Return what `made_once` makes of all pictures of a data set."""
        encode = self._compiled(self.made_once)
        size, rows = self.tokenizer_config.image_size, self.eval_rows
        names, parts = data.images or [""], []
        for first in range(0, len(names), rows):
            batch = np.zeros((rows, size, size, 3), np.uint8)
            for i, name in enumerate(names[first : first + rows]):
                image = data.image(name) if name else None
                batch[i] = 0 if image is None else image
            parts.append(np.asarray(encode(encoder, self._global(batch))))
        return np.concatenate(parts)[: len(names)]

    def final_notes(self) -> list[str]:
        """Return lines about skipped data, and the model's answers to some questions."""
        return [*self._train_set.notes(), *self._eval_set.notes(), *self._questions.notes()]

    @property
    def data_set(self) -> Any:
        """The opened training data."""
        return self._train_set

    def data(self) -> Any:
        """Return this process's share of the training batches."""
        share, shares = mesh.batch_share(self.mesh, self.config.batch_size // self.pack)
        return batches.train_batches(
            self._train_set,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shard_index=share,
            shard_count=shares,
            pixels=not self.images,
        )

    @functools.cached_property
    def _loss(self):
        """Compiled (params, batch with features) -> sums."""
        trainer = self.trainer

        def loss(params, batch):
            # Each row brings its own picture's features: a table of one row per row.
            own = {"features": batch["features"]}
            index = jnp.arange(batch["features"].shape[0])[:, None]
            return trainer.loss(params, own, {**batch, "image_index": index})

        return self._compiled(loss)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return the held-out loss, and how often the first answer is that of the data."""
        params = self.weights(state)
        figures, asked = self.held_out(params), self._questions
        if self.config.eval.max_new and len(asked):
            asked.answers = self._answer(params)
            figures["exact_match"] = asked.exact(asked.answers)
        if int(state.step) == self.config.total_steps:
            figures |= self.at_the_end(params)
        return figures

    def held_out(self, params: PyTree) -> dict[str, float]:
        """Return the held-out loss and the share of labels that rank first."""
        sums = Counter()
        for batch in batches.eval_batches(self._eval_set, batch_size=self.eval_rows, pixels=False):
            batch["features"] = self._eval_table[batch.pop("image_index")[:, 0]]
            sums.update(jax.tree.map(float, self._loss(params, self._global(batch))))
            self.between_batches()
        labels = max(sums["labels"], 1.0)
        return {"loss": sums["loss"] / labels, "accuracy": sums["right"] / labels}

    def at_the_end(self, params: PyTree) -> dict[str, float]:
        """Return figures of a finished run: what answers would be without the picture."""
        asked = self._questions
        if not asked.answers:
            return {}
        return {
            "exact_match_other_images": asked.exact(self._answer(params, 1)),
            "largest_answer": asked.most_common(),
        }

    @functools.cached_property
    def _greedy(self):
        """Compiled (params, prompt) -> ids."""
        model, key = self.model, jax.random.key(0)
        decoding = Decoding(self.config.eval.max_new, self._questions.stop_ids)
        return self._compiled(lambda params, prompt: answer(model, params, prompt, key, decoding))

    def _answer(
        self, params: PyTree, other: int = 0, asked: HeldOutQuestions | None = None
    ) -> list[str]:
        """Answer the held-out questions; `other` > 0 shows each another question's picture."""

        def decode(prompt: dict[str, np.ndarray]) -> np.ndarray:
            ids_BN = np.asarray(self._greedy(params, self._global(prompt)))
            self.between_batches()
            return ids_BN

        return (asked or self._questions).answer(decode, self.eval_rows, other)

    def visualize(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """Return a grid of held-out pictures with the model's answers."""
        asked = self._questions
        if not len(asked) or not self.config.eval.max_new:
            return {}
        asked.answers = asked.answers or self._answer(self.weights(state))
        return {"answers": asked.grid(self.config.eval.grid_images)}
