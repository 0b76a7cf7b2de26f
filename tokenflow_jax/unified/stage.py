"""The unified stage: conversations, codes and evaluation around `train.Trainer.step`."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.chat import batches, drawing
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.data.chat.templates import get_template
from tokenflow_jax.data.text import PromptIds, load_text_tokenizer
from tokenflow_jax.generation import stage as generation
from tokenflow_jax.generation.api import Generator
from tokenflow_jax.generation.drawing import Draws
from tokenflow_jax.generation.sample import Recipe
from tokenflow_jax.tokenizer.frozen import encoder_params
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.names import PART as TOKENIZER
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.understanding import stage as understanding
from tokenflow_jax.understanding.answer import Decoding, answer
from tokenflow_jax.understanding.complete import complete_model
from tokenflow_jax.understanding.held_out import HeldOutQuestions
from tokenflow_jax.understanding.model import visual_features
from tokenflow_jax.understanding.train import TrainState
from tokenflow_jax.unified import start
from tokenflow_jax.unified.model import Unified, UnifiedConfig
from tokenflow_jax.unified.names import PART
from tokenflow_jax.unified.train import KINDS, LossConfig, Trainer
from tokenflow_jax.weights import start as weights_start

PyTree = Any
_LARGEST_BANK = 5_000  # pictures among which drawn ones are looked up


class UnifiedStage(Draws, understanding.UnderstandingStage):
    """Trains the model that reads and draws; its config is `configs/unified.py`."""

    name, part = "unified", PART
    headline = ("loss/total", "accuracy/answers", "accuracy/codes")
    beside_adapters = generation.GenerationStage.beside_adapters

    @functools.cached_property
    def prompts(self) -> PromptIds:
        """The ids around requests to draw; without a text tokenizer only their number is known."""
        config, data = self.config, self.config.data
        budget = max(1, data.max_length - self._drawn_codes)
        if not config.text_tokenizer:
            return PromptIds(budget, 1, 2, 0, (), (), config.model.image_start or 1)
        template = get_template(data.template, data.system if data.own_system else None)
        text_tokenizer = load_text_tokenizer(config.text_tokenizer)
        return drawing.DrawingPrompts(text_tokenizer, budget, template, config.model.image_start)

    @property
    def drawn(self) -> Drawn:
        """What a drawn picture becomes in a row."""
        every, prompts = self.tokenizer_config.pyramid.tokens, self.prompts
        trained = self._drawn_codes if self._drawn_codes < every else 0
        return Drawn(every, prompts.open_ids, prompts.close_ids, trained)

    @property
    def shown_scales(self) -> int:
        """The scales of a picture that the model learns to draw."""
        return self.config.data.drawn_scales or len(self.tokenizer_config.pyramid)

    @property
    def _drawn_codes(self) -> int:
        slices, count = self.tokenizer_config.pyramid.slices(), self.shown_scales
        if not 0 < count <= len(slices):
            raise ValueError(f"data.drawn_scales {count} is not in 0 to {len(slices)}")
        return slices[count - 1].stop

    @functools.cached_property
    def model_config(self) -> UnifiedConfig:
        """The model's hyper-parameters, completed by the tokenizers."""
        given, tokenizer = self.config.model.to_dict(), self.tokenizer_config
        given = generation.complete_model(given, tokenizer, self.prompts)
        given = complete_model(given, tokenizer, self.config.text_tokenizer)
        return self.with_own_choices(given)

    @functools.cached_property
    def model(self) -> Unified:
        """The unified model."""
        return self.adapted(Unified(self.model_config, self.dtype))

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The training step's modules and options."""
        config = self.config
        return Trainer(
            model=self.model,
            tokenizer=TokenFlow(self.tokenizer_config),
            optimizer=self.optimizer,
            precision=self.encoder_precision,
            trainable=self.trainable,
            adapters=self.adapters,
            accumulate=config.accumulate,
            loss_tokens=config.loss_tokens,
            sources=self.sources,
            losses=LossConfig(**config.losses),
        )

    @property
    def frozen_shapes(self) -> PyTree:
        """Shapes of the frozen tokenizer, as far as the step reads it, and of a table of codes."""
        template = TOKENIZER.template(self.tokenizer_config)
        if not self.images:
            return {"tokenizer": encoder_params(template)}
        table = jax.ShapeDtypeStruct((self.images, self.drawn.codes), jnp.int32)
        return {"codes": table, "tokenizer": Codebooks.of(template).params()}

    def _with_table(self, table: np.ndarray) -> PyTree:
        return {"codes": table, "tokenizer": Codebooks.of(self.tokenizer_arrays).params()}

    @property
    def made_once(self) -> Callable[[PyTree, jax.Array], jax.Array]:
        return self.trainer.image_codes

    def open(self) -> "UnifiedStage":
        """Load the tokenizer, open the conversations, make the tables of codes."""
        self._recipe = Recipe(**self.config.sampling)
        self._recipe.check(self.model_config)
        super().open()
        sets = getattr(self._train_set, "sets", [self._train_set])
        drawn = next((own for own in sets if own.config.task == "draw"), sets[0])
        self._requests = {"trained": _Requests(drawn), "unseen": _Requests(self._eval_set)}
        return self

    @property
    def own_ids(self) -> int:
        """The codes' ids, from code 0 on."""
        return self.model_config.image_start

    @property
    def brought(self) -> PyTree:
        """Marks of the parameters that config.init_from replaces wholly: a language model's."""
        if weights_start.is_language_model(self.config.init_from):
            return super().brought
        return jax.tree.map(lambda _: False, self.parameters)  # a run may bring a part

    def load_parameters(self, params: PyTree) -> tuple[PyTree, str]:
        """Return the weights of config.init_from; see `start.load`."""
        places = jax.tree.map(lambda x: x.sharding, params)
        where = (self.config.init_from, self.model_config)
        return start.load(*where, params, places, self.tokenizer_identity)

    def _questions_about(
        self, table: np.ndarray, among: Mapping[str, str] | None = None
    ) -> HeldOutQuestions:
        """Return the held-out questions for pictures of a table of codes, or some `among` them."""
        pyramid, strategy = self.model_config.pyramid, self.model_config.strategy
        codebooks = self.tokenizer.codebooks
        read = jax.jit(lambda codes_IN: visual_features(codes_IN, codebooks, pyramid, strategy))
        return HeldOutQuestions(self._eval_set, np.asarray(read(table)), among)

    @functools.cached_property
    def _sums(self) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
        """Compiled (params, frozen tokenizer, batch with codes) -> sums."""
        trainer = self.trainer

        def sums(params, tokenizer, batch):
            # Each row brings its own picture's codes: a table of one row per row.
            own = {"codes": batch["codes"], "tokenizer": tokenizer}
            index = jnp.arange(len(batch["codes"]))[:, None]
            return trainer.loss(params, own, {**batch, "image_index": index})

        return self._compiled(sums)

    @functools.cached_property
    def _greedy(self):
        """Compiled (params, prompt) -> ids."""
        model, key = self.model, jax.random.key(0)
        decoding = Decoding(self.config.eval.max_new, self._questions.stop_ids)

        def greedy(params, prompt):
            prompt = prompt | {"features": {"read": prompt["features"]}}
            return answer(model, params, prompt, key, decoding)

        return self._compiled(greedy)

    def held_out(self, params: PyTree) -> dict[str, float]:
        """Return the held-out losses and accuracies."""
        total = None
        for batch in batches.eval_batches(self._eval_set, batch_size=self.eval_rows, pixels=False):
            batch["codes"] = self._eval_table[batch.pop("image_index")[:, 0]]
            sums = self._sums(params, self.frozen["tokenizer"], self._global(batch))
            sums = jax.tree.map(np.asarray, sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            self.between_batches()
        with np.errstate(invalid="ignore"):  # a kind that no conversation is of
            found = self.trainer.metrics(total)
        names = {
            "loss": "loss/total", "loss_text": "loss/text", "loss_codes": "loss/codes",
            "accuracy": "accuracy/answers", "accuracy_codes": "accuracy/codes",
            **{f"loss_{kind}": f"kind/{kind}" for kind in KINDS},
        }  # fmt: skip
        figures = {name: float(found[key]) for name, key in names.items()}
        return {name: value for name, value in figures.items() if np.isfinite(value)}

    def at_the_end(self, params: PyTree) -> dict[str, float]:
        """Return how often drawn pictures are recognized: by their caption, and by the model."""
        figures, options = super().at_the_end(params), self.config.eval
        if not options.retrieval or self.drawn.trained:  # its finer scales would be noise
            return figures
        figures |= self.recognized(params, self._requests)
        return figures | self.cycle(params, self.generator.with_params(params))

    def cycle(self, params: PyTree, drawn: Generator) -> dict[str, float]:
        """Draw from held-out requests, and ask the held-out questions about what was drawn.

        The model sees that picture alone, not the request, which says what it should show. Its
        weights, `params`, may be another run's than those that draw.
        """
        asked, options = self._questions, self.config.eval
        requests = self._requests["unseen"].some(options.retrieval, asked.images)
        if not requests or not options.max_new:
            return {}
        texts, size = list(requests.values()), options.sample_batch
        table = np.array(self._eval_table)
        places = [self._eval_set.image_places[image] for image in requests]
        table[places] = drawn.codes(texts, [0] * len(texts), self._recipe, size)
        asked = self._questions_about(table, requests)
        return {"cycle": asked.exact(self._answer(params, asked=asked))}

    def visualize(self, state: TrainState) -> Mapping[str, np.ndarray]:
        """Return grids: answers, pictures of fixed prompts, and how they grow scale by scale."""
        grids = dict(super().visualize(state))
        if self.config.eval.prompts:
            grids |= self.drawings(self.weights(state))
        return grids


class _Requests:
    """The pictures of conversations that begin with one, with what was asked for."""

    array = "image"

    def __init__(self, data: Conversations):
        self._data, self.name, self.skipped = data, data.name, data.skipped
        self._requests: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._requests is None:  # only the end of a run asks
            self._requests = {}
            for request, image in drawing.first_drawings(self._data, 4 * _LARGEST_BANK):
                self._requests.setdefault(image, request)
        return self._requests

    def some(self, count: int, among: Collection[str]) -> dict[str, str]:
        """Return at most so many among some pictures, evenly spaced: picture -> request."""
        pairs = [pair for pair in self._all().items() if pair[0] in among]
        count = min(count, len(pairs))
        return dict(pairs[i * len(pairs) // count] for i in range(count))

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        image, request = list(self._all().items())[index]
        pixels = self._data.image(image)
        return None if pixels is None else {"caption": request, "image": pixels}
