"""Wires the understanding model's training step to the loop: data, frozen tokenizer, evaluation.

The method itself is in `understanding.train`; here is what surrounds it.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokenflow_jax.data.chat import batches as conversation_batches
from tokenflow_jax.data.chat import insertion, questions
from tokenflow_jax.data.chat.batches import ConversationConfig, Conversations
from tokenflow_jax.evals.vqa_text import normalize
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import api
from tokenflow_jax.train.loop import Stage
from tokenflow_jax.train.program import encoder_parts
from tokenflow_jax.understanding import start as understanding_start
from tokenflow_jax.understanding.answer import Decoding, answer
from tokenflow_jax.understanding.answer_pictures import answer_grid
from tokenflow_jax.understanding.program import Program
from tokenflow_jax.understanding.train import TrainState, image_features

PyTree = Any
FEATURES = ("once", "step")
_ROUND = 32  # prompts are padded to a multiple, so that few programs are compiled


def make_stage(config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh) -> Stage:
    """Builds the understanding stage from a config such as `configs/understanding.py`.

    What the tokenizers decide (see `understanding_program.complete_model`) and the image
    tokenizer's fingerprint are filled into the config, so that a checkpoint says all about itself.

    Args:
      config: see the comments there.
      device_mesh: of `mesh.make_mesh`.

    Returns:
      What `loop.train_and_evaluate` needs.

    Raises:
      ValueError: bad values, or files that the config names and that do not exist or fit.
    """
    return _UnderstandingStage(config, device_mesh).stage()


class _UnderstandingStage:
    """The functions of the stage; holds what they share."""

    def __init__(self, config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, device_mesh
        _check(config)
        program = Program(config, device_mesh, jax.default_backend())
        self.tokenizer = api.Tokenizer.load(config.tokenizer.path, config.tokenizer.variant or None)
        self._fill_in(program)
        self.train_set = Conversations(self._data(program, config.data.split))
        self.eval_set = Conversations(
            self._data(program, config.data.eval_split, held_out=True),
            config.eval.conversations or None,
        )
        conversation_batches.check_usable(self.train_set)
        encoder = encoder_parts(self.tokenizer.params)
        encoder = jax.device_put(encoder, mesh.shardings(encoder, device_mesh))
        images = 0
        if config.data.features == "once":
            table = self._table(program, encoder, self.train_set)
            frozen, images = {"features": table}, len(table)
        else:
            frozen = {"tokenizer": encoder}
        self.frozen = jax.device_put(frozen, mesh.shardings(frozen, device_mesh))
        self.program = dataclasses.replace(program, images=images)
        # Held-out pictures are few: their features are made once, whatever the training does.
        self._eval_table = self._table(program, encoder, self.eval_set)
        broken = self.eval_set.broken_images
        asked = questions.first_questions(self.eval_set)
        self._asked = [question for question in asked if question.image not in broken]
        self._answers: list[str] = []
        self.notes = [
            f"image tokenizer {config.tokenizer.path}, fingerprint {self.tokenizer.fingerprint}; "
            f"{program.vectors} vectors of {program.model_config.vision_channels} channels per "
            f"image ({program.model_config.strategy}); text tokenizer {config.data.text_tokenizer}",
            f"{len(self.train_set)} conversations train, {len(self.eval_set)} held-out ones "
            "are measured",
            *mesh.describe_whole(self.program.state, device_mesh),
        ]

    def _fill_in(self, program: Program) -> None:
        """Puts into the config what a checkpoint has to know of the tokenizers."""
        config, fingerprint = self.config, self.tokenizer.fingerprint
        given = config.tokenizer.fingerprint
        if given and given != fingerprint:
            raise ValueError(
                f"tokenizer.path {config.tokenizer.path} has the fingerprint {fingerprint}, not "
                f"{given}: its codes mean something else. Give the tokenizer of the earlier run, "
                "or tokenizer.fingerprint='' to train on another one"
            )
        model = dataclasses.asdict(program.model_config)
        # These two are choices of a run, not of the model: another run may take others.
        for name in ("remat", "attention"):
            model["lm"].pop(name)
        with config.unlocked():
            config.model = ml_collections.ConfigDict(model)
            config.tokenizer.fingerprint = fingerprint

    def _data(self, program: Program, split: str, held_out: bool = False) -> ConversationConfig:
        data = self.config.data
        return ConversationConfig(
            name=data.name,
            path=data.eval_path if held_out and data.eval_path else data.path,
            image_folder=data.image_folder,
            split=split,
            questions=tuple(self.config.eval.questions if held_out else data.questions),
            together=data.together and not held_out,
            template=data.template,
            system=data.system if data.own_system else None,
            text_tokenizer=data.text_tokenizer,
            image_mode=data.image_mode,
            image_size=program.tokenizer_config.image_size,
            vectors=program.vectors,
            max_length=data.max_length,
            pack=1 if held_out else self.config.pack,
            buckets=tuple(data.buckets),
            order=data.order,
        )

    def _global(self, tree: PyTree) -> PyTree:
        """NumPy arrays that are the same in all processes, split over the devices."""
        sharding = mesh.batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), tree
        )

    def _rows_of_batch(self) -> int:
        """A number of rows that the devices can share, at least the config's."""
        parts = mesh.batch_parts(self.mesh)
        return -(-self.config.eval.batch_size // parts) * parts

    def _table(self, program: Program, encoder: PyTree, data: Conversations) -> np.ndarray:
        """Features of all pictures of a data set, float32 (images, N, C)."""
        tokenizer, strategy = program.trainer.tokenizer, program.model_config.strategy
        encode = mesh.bind(
            self.mesh,
            jax.jit(
                lambda params, images: image_features(tokenizer, params, images, strategy),
                out_shardings=mesh.replicated(self.mesh),
            ),
        )
        size, rows = program.tokenizer_config.image_size, self._rows_of_batch()
        names, parts = data.images or [""], []
        for start in range(0, len(names), rows):
            batch = np.zeros((rows, size, size, 3), np.uint8)
            for i, name in enumerate(names[start : start + rows]):
                image = data.image(name) if name else None
                batch[i] = 0 if image is None else image
            parts.append(np.asarray(encode(encoder, self._global(batch))))
        return np.concatenate(parts)[: len(names)]

    def stage(self) -> Stage:
        """Returns the assembled stage."""
        return Stage(
            name="understanding",
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
            headline=("loss/total", "accuracy/answers"),
        )

    def final_notes(self) -> list[str]:
        """What was skipped, and what the model says about some pictures."""
        said = [
            f"{self._asked[i].text} {self._answers[i]} (in the data: {self._asked[i].answer})"
            for i in (self._spread(10) if self._answers else [])
        ]
        return [*self.train_set.notes(), *self.eval_set.notes(), *said]

    def train_data(self) -> Any:
        """This process's share of the training data, infinite."""
        share, shares = mesh.batch_share(self.mesh, self.program.rows)
        return conversation_batches.train_batches(
            self.train_set,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shard_index=share,
            shard_count=shares,
            pixels=self.config.data.features == "step",
        )

    def init(self) -> TrainState:
        """The state from scratch: random weights."""
        shardings = jax.tree.map(lambda x: x.sharding, self.program.state)
        init = jax.jit(self.program.trainer.init, out_shardings=shardings)
        return init(jax.random.key(self.config.seed))

    def warm_start(self, state: TrainState) -> tuple[TrainState, str]:
        """Takes the weights of config.init_from: a language model or an understanding model."""
        params, text = understanding_start.start_from(
            self.config.init_from,
            state.params,
            self.program.model_config,
            mesh.shardings(state.params, self.mesh),
        )
        return state.replace(params=params), text

    @functools.cached_property
    def _loss(self):
        """Compiled (params, batch with features) -> sums."""
        trainer = self.program.trainer

        def loss(params, batch):
            # Each row brings its own picture's features: a table of one row per row.
            own = {"features": batch["features"]}
            index = jnp.arange(batch["features"].shape[0])[:, None]
            return trainer.loss(params, own, {**batch, "image_index": index})

        return mesh.bind(self.mesh, jax.jit(loss, out_shardings=mesh.replicated(self.mesh)))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out loss, and how often the first answer is that of the data."""
        sums = Counter()
        batches = conversation_batches.eval_batches(
            self.eval_set, batch_size=self._rows_of_batch(), pixels=False
        )
        for batch in batches:
            batch["features"] = self._eval_table[batch.pop("image_index")[:, 0]]
            sums.update(jax.tree.map(float, self._loss(state.params, self._global(batch))))
        labels = max(sums["labels"], 1.0)
        figures = {"loss": sums["loss"] / labels, "accuracy": sums["right"] / labels}
        if self.config.eval.max_new and self._asked:
            self._answers = list(self._answer(state.params))
            figures["exact_match"] = self._exact(self._answers)
        if int(state.step) == self.config.total_steps and self._answers:
            figures["exact_match_other_images"] = self._exact(list(self._answer(state.params, 1)))
            counts = Counter(normalize(asked.answer) for asked in self._asked)
            figures["largest_answer"] = counts.most_common(1)[0][1] / len(self._asked)
        return figures

    def _exact(self, answers: list[str]) -> float:
        pairs = zip(self._asked, answers, strict=True)
        return float(np.mean([normalize(a.answer) == normalize(text) for a, text in pairs]))

    @functools.cached_property
    def _decoding(self) -> Decoding:
        data = self.eval_set
        return Decoding(self.config.eval.max_new, data.template.stop_ids(data.text_tokenizer))

    @functools.cached_property
    def _greedy(self):
        """Compiled (params, prompt) -> ids."""
        model, decoding, key = self.program.model, self._decoding, jax.random.key(0)
        run = jax.jit(
            lambda params, prompt: answer(model, params, prompt, key, decoding),
            out_shardings=mesh.replicated(self.mesh),
        )
        return mesh.bind(self.mesh, run)

    def _answer(self, params: PyTree, other: int = 0) -> Iterator[str]:
        """Answers of the held-out questions.

        Args:
          params: of the model.
          other: shows the picture of another question, at random; 0 shows the right one.
        """
        asked, places, rows = self._asked, self.eval_set.image_places, self._rows_of_batch()
        shown = np.arange(len(asked))
        if other:
            shown = np.random.default_rng(other).permutation(len(asked))
        longest = max(len(a.row["ids"]) for a in asked)
        length = -(-longest // _ROUND) * _ROUND
        for start in range(0, len(asked), rows):
            part = list(range(start, min(start + rows, len(asked))))
            prompt = insertion.pad_rows(
                [asked[i].row for i in part] + [{}] * (rows - len(part)), length, "left"
            )
            del prompt["labels"]
            index = [places.get(asked[shown[i]].image, 0) for i in part]
            index += [0] * (rows - len(part))
            prompt["features"] = self._eval_table[index][:, None]
            ids_BN = np.asarray(self._greedy(params, self._global(prompt)))
            for ids_N in ids_BN[: len(part)]:
                yield questions.answer_text(
                    self.eval_set.text_tokenizer, ids_N, self._decoding.stop_ids
                )

    def _spread(self, most: int) -> list[int]:
        """Places of so many questions, from all over the data."""
        count = min(most, len(self._asked))
        return [i * len(self._asked) // count for i in range(count)]

    def visualize(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """A grid of held-out pictures with the model's answers."""
        if not self._asked or not self.config.eval.max_new:
            return {}
        if not self._answers:
            self._answers = list(self._answer(state.params))
        cells = []
        for i in self._spread(self.config.eval.grid_images):
            image = self.eval_set.image(self._asked[i].image) if self._asked[i].image else None
            cells.append((image, self._answers[i], self._asked[i].answer))
        return {"answers": answer_grid(cells)}


def _check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for what this variant still needs, and for values that are none."""
    problems = []
    if not config.tokenizer.path:
        problems.append(
            "this variant needs a trained image tokenizer: --config.tokenizer.path=, a workdir or "
            "a PyTorch file (with --config.tokenizer.variant=)"
        )
    if not config.data.text_tokenizer:
        problems.append(
            "this variant needs a text tokenizer: --config.data.text_tokenizer=FOLDER of the "
            "language model, or 'bytes'"
        )
    if config.data.features not in FEATURES:
        problems.append(f"data.features {config.data.features!r} is not one of {FEATURES}")
    if config.data.name == "jsonl" and not config.data.path:
        problems.append("data.path must name the file of conversations")
    if problems:
        raise ValueError("; ".join(problems))
