"""The public Python API of understanding: questions about pictures, and conversations.

assistant = tfx.Assistant.load("runs/understanding")
assistant.answer("Which kind of thing is this?", "apple.png")
chat = assistant.chat()
for piece in chat.stream("What is this?", "apple.png"): print(piece, end="")
chat.ask("Can one eat it?")
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.chat import conversations, insertion, questions, templates
from tokenflow_jax.data.chat.templates import GPT, Template, Turn, without_markers
from tokenflow_jax.data.pictures import Picture, read_picture
from tokenflow_jax.data.text import load_text_tokenizer
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.loading import (
    TrainedModel,
    describe,
    load_model,
    save_language_model,
)
from tokenflow_jax.understanding import rows
from tokenflow_jax.understanding.answer import Decoding, programs
from tokenflow_jax.understanding.chat import Chat, as_list, human_turn
from tokenflow_jax.understanding.folder import torch_config
from tokenflow_jax.understanding.model import (
    Understanding,
    UnderstandingConfig,
    feature_channels,
    vectors_per_image,
    visual_features,
)
from tokenflow_jax.understanding.names import PART
from tokenflow_jax.understanding.session import Session
from tokenflow_jax.weights.card import UNKNOWN, Trained
from tokenflow_jax.weights.pretrained import Pretrained

_REPLACEMENT = "\ufffd"  # decodes an incomplete character


@dataclasses.dataclass(frozen=True, repr=False)
class Assistant(Pretrained):
    """A language model that reads pictures through a tokenizer."""

    config: UnderstandingConfig
    params: dict
    tokenizer: Tokenizer  # of images, the one that the model was trained with
    text_tokenizer: Any
    template: Template  # of conversations, as in training
    image_mode: str = "pad"  # or "square", as in training
    dtype: str = "float32"  # of the language model's computation
    max_length: int = 2048  # tokens of a conversation, images and answer included
    device_mesh: mesh.Mesh | None = None  # holds `params`; None if one device has all of them
    trained: Trained = UNKNOWN  # where the weights come from, for `save_pretrained`
    model: Understanding | None = None  # runs `params`; None: the plain one

    drawn: ClassVar[insertion.Drawn | None] = None  # it only reads

    def __post_init__(self):
        own, strategy = self.tokenizer.config, self.config.strategy
        channels = feature_channels(own.semantic_channels, own.pixel_channels, strategy)
        if channels != self.config.vision_channels:
            raise ValueError(
                f"the image tokenizer gives {channels} channels ({strategy}), the model reads "
                f"{self.config.vision_channels}"
            )
        if len(self.text_tokenizer) > self.config.lm.vocabulary_size:
            raise ValueError(
                f"the text tokenizer has {len(self.text_tokenizer)} ids, the model "
                f"{self.config.lm.vocabulary_size}"
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        variant: str | None = None,
        *,
        tokenizer: str | os.PathLike | Tokenizer | None = None,
        tokenizer_variant: str | None = None,
        text_tokenizer: str | os.PathLike | None = None,
        template: str | None = None,
        system: str | None = None,
        image_mode: str | None = None,
        step: int | None = None,
        dtype: str = "auto",
        weights_dtype: str = "",
    ) -> "Assistant":
        """Load a model, spread over all devices of this process.

        Args:
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` or
            `save_pretrained` wrote, or a folder in the released layout.
          variant: one of `understanding.model.VARIANTS`, for PyTorch weights without a config.json.
          tokenizer, tokenizer_variant: the image tokenizer or its path; the model in a PyTorch one.
          text_tokenizer: a folder or "bytes"; a folder in the released layout holds its own.
          template, system, image_mode: as in training; runs record these and the tokenizers.
          step: checkpoint of a workdir; the newest by default.
          dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
          weights_dtype: of the decoder's linear layers, if not `dtype`: "int8" halves a bfloat16
            model's memory; "int4", "nf4" quarter it and cost accuracy. Needs qwix.

        Raises:
          CodesError: the tokenizer is not the one that the model was trained with.
          ValueError: weights that do not fit, or a setting that is known from nowhere.
        """
        path = os.fspath(path)
        config, known = torch_config(path, variant)
        model = load_model(
            path, PART, Understanding, config, known, tokenizer=tokenizer, step=step, dtype=dtype,
            tokenizer_variant=tokenizer_variant, weights_dtype=weights_dtype,
        )  # fmt: skip
        return cls._of(path, model, text_tokenizer, template, system, image_mode)

    @classmethod
    def _of(
        cls,
        path: str,
        model: TrainedModel,
        text_tokenizer: str | os.PathLike | None,
        template: str | None,
        system: str | None,
        image_mode: str | None,
        **more: Any,
    ) -> "Assistant":
        data = model.saved.get("data", {})
        text_tokenizer = text_tokenizer or model.saved.get("text_tokenizer")
        if not text_tokenizer:
            raise ValueError(f"{path} does not name the text tokenizer that it reads: give it")
        if system is None and data.get("own_system"):
            system = data.get("system")
        return cls(
            config=model.config,
            params=model.params,
            tokenizer=model.tokenizer,
            text_tokenizer=load_text_tokenizer(text_tokenizer),
            template=templates.get_template(template or data.get("template", "qwen_2_5"), system),
            image_mode=image_mode or data.get("image_mode", "pad"),
            dtype=model.dtype,
            max_length=max(data.get("max_length", 0), 2048),
            device_mesh=model.device_mesh,
            trained=model.trained,
            model=model.model,
            **more,
        )

    from_pretrained = load

    def _save(self, folder: str | os.PathLike, **options: Any) -> None:
        data = {"data": self.data_settings}
        save_language_model(self, folder, PART, data, self.text_tokenizer, **options)

    @property
    def data_settings(self) -> dict[str, Any]:
        """What `load` must know of the training's data."""
        conversation = {"template": self.template.name, "system": self.template.system}
        pictures = {"image_mode": self.image_mode, "max_length": self.max_length}
        return {**conversation, "own_system": True, **pictures}

    def __repr__(self) -> str:
        return describe(type(self).__name__, self, self.text_tokenizer)

    @property
    def vectors(self) -> int:
        return vectors_per_image(self.tokenizer.config.pyramid, self.config.strategy)

    @property
    def _module(self) -> Understanding:
        return self.model or Understanding(self.config, jnp.dtype(self.dtype))

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable]:
        """Jitted functions of (params, ...), and "features" of (codes, codebooks)."""
        compiled = programs(self._module, self.device_mesh)
        scales, strategy = self.tokenizer.config.pyramid, self.config.strategy
        features = functools.partial(visual_features, scales=scales, strategy=strategy)
        return compiled | {"features": jax.jit(features)}

    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Return what the language model reads of pictures of any size: float32 (images, N, C)."""
        return np.asarray(
            self._compiled["features"](self.codes(pictures), self.tokenizer.codebooks)
        )

    def codes(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Return the codes of pictures of any size: int32 (images, codes)."""
        size, arrays = self.tokenizer.config.image_size, []
        for picture in pictures:
            image_HWC = read_picture(picture)
            if image_HWC.dtype != np.uint8:
                raise ValueError(f"a picture of dtype {image_HWC.dtype}: give uint8 (H, W, 3)")
            arrays.append(conversations.fit_image(image_HWC, size, self.image_mode))
        return self.tokenizer.encode(np.stack(arrays))

    def decoding(self, max_new: int, temperature: float, top_k: int, top_p: float) -> Decoding:
        """Return decoding options with this model's stop ids."""
        stops = self.template.stop_ids(self.text_tokenizer)
        pad = self.text_tokenizer.pad_token_id or 0
        return Decoding(max_new, stops, pad, temperature, top_k, top_p)

    def answer(
        self,
        question: str | Sequence[str],
        image: Picture | Sequence[Picture | None] | None = None,
        *,
        max_new: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Answer one question, or each in a list.

        Args:
          question: a text, or a list of them.
          image: a picture or several, uint8; for a list of questions one entry each, or None.
          max_new: tokens of an answer at most.
          temperature: 0 takes the most likely token.
          top_k, top_p, seed: filters, of which 0 is off, and seed of the draws.

        Raises:
          ValueError: a question that is too long, or pictures that cannot be read.
        """
        single = isinstance(question, str)
        asked = [question] if single else list(question)
        shown = [image] if single else [None] * len(asked) if image is None else list(image)
        if len(shown) != len(asked):
            raise ValueError(f"{len(asked)} questions and {len(shown)} images: give one for each")
        pictures = [as_list(i) for i in shown]
        turns = [[human_turn(q, len(i))] for q, i in zip(asked, pictures, strict=True)]
        decoding = self.decoding(max_new, temperature, top_k, top_p)
        prompt = self._prompt(turns, pictures, max_new)
        key = jax.random.key(seed)
        ids_BN = self._compiled["answer"](self.params, prompt, key, decoding=decoding)
        texts = [
            questions.answer_text(self.text_tokenizer, ids_N, decoding.stop_ids)
            for ids_N in np.asarray(ids_BN)
        ]
        return texts[0] if single else texts

    def chat(self) -> Chat:
        """Start a conversation."""
        return Chat(self)

    def session(self) -> Session:
        """Begin a conversation's cache."""
        return Session(self._compiled, self.params, self.vectors, self._row_features)

    def stream(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        how: Decoding,
        seed: int = 0,
        session: Session | None = None,
    ) -> Iterator[str]:
        """Yield the next answer of a conversation piece by piece; see `Chat.stream`.

        A `session` has what was read of the conversation before.
        """
        session, said = session or self.session(), ""
        for ids_N, done in session.tokens(self._row(turns, how.max_new), pictures, how, seed):
            text = questions.answer_text(self.text_tokenizer, ids_N, how.stop_ids)
            # A character of several tokens waits for the last of them.
            if text.startswith(said) and (done or not text.endswith(_REPLACEMENT)):
                if text != said:
                    yield text[len(said) :]
                said = text

    def _row(self, turns: Sequence[Turn], max_new: int) -> dict[str, np.ndarray]:
        room = self.max_length - max_new
        how = (self.template, self.text_tokenizer)
        return questions.question_row(*how, list(turns), self.vectors, room, self.drawn)

    def _prompt(
        self, turns: Sequence[Sequence[Turn]], pictures: Sequence[Sequence[Picture]], max_new: int
    ) -> dict[str, np.ndarray]:
        """Return rows, padded on the left to one of few lengths, and their pictures' features."""
        prompt = rows.padded([self._row(t, max_new) for t in turns], "left")
        del prompt["labels"]
        return {**prompt, "features": self._row_features(pictures)}

    def _row_features(self, pictures: Sequence[Sequence[Picture]]) -> np.ndarray:
        """Return the features of each row's pictures, float32 (B, M, N, C), zero-padded."""
        flat = [picture for own in pictures for picture in own]
        found = self.features(flat) if flat else ()
        counts, size = [len(own) for own in pictures], (self.vectors, self.config.vision_channels)
        return rows.features(found, counts, *size)

    def likelihood(
        self,
        asked: Sequence[str],
        pictures: Sequence[Picture | None],
        answers: Sequence[str],
    ) -> list[tuple[float, bool]]:
        """Return each answer's log probability, and True if all its ids are the most likely."""
        own, answered = [as_list(picture) for picture in pictures], []
        for question, shown, text in zip(asked, own, answers, strict=True):
            turns = [human_turn(question, len(shown)), (GPT, without_markers(text))]
            tokens = self.template.tokenize(self.text_tokenizer, turns)
            answered.append(insertion.merge_row(tokens.ids_L, tokens.labels_L, self.vectors))
        batch = rows.padded(answered)
        arrays = [batch[name] for name in ("ids", "labels", "places", "segments")]
        found = self._compiled["likelihood"](self.params, *arrays, self._row_features(own))
        return list(zip(*(np.asarray(x).tolist() for x in found), strict=True))
