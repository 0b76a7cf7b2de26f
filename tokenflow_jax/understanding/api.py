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
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokenflow_jax.data import images
from tokenflow_jax.data.chat import conversations, insertion, questions, templates
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE, Template, Turn
from tokenflow_jax.data.text import load_text_tokenizer
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import api
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.understanding.answer import AnswerState, Decoding, answer, start, step
from tokenflow_jax.understanding.folder import read_understanding_config
from tokenflow_jax.understanding.model import (
    Understanding,
    UnderstandingConfig,
    feature_channels,
    vectors_per_image,
    visual_features,
)
from tokenflow_jax.understanding.names import PART
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.rules import unflatten

Picture = Any  # a path, a PIL image, or uint8 (H, W, 3)
_ROUND = 64  # prompts are padded to a multiple, so that few programs are compiled
_UNFINISHED = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A language model that reads pictures through a tokenizer.

    Attributes:
      config, params: the understanding model.
      tokenizer: of images, the one that the model was trained with.
      text_tokenizer: of text.
      template: of conversations, as in training.
      image_mode: "pad" or "square", as in training.
      dtype: what the language model computes in.
      max_length: tokens of a conversation, images and answer included.
      device_mesh: over which `params` are spread; None where one device has all of them.
    """

    config: UnderstandingConfig
    params: dict
    tokenizer: api.Tokenizer
    text_tokenizer: Any
    template: Template
    image_mode: str = "pad"
    dtype: str = "float32"
    max_length: int = 2048
    device_mesh: mesh.Mesh | None = None

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
        tokenizer: str | os.PathLike | api.Tokenizer | None = None,
        tokenizer_variant: str | None = None,
        text_tokenizer: str | os.PathLike | None = None,
        template: str | None = None,
        system: str | None = None,
        image_mode: str | None = None,
        step: int | None = None,
        dtype: str = "auto",
    ) -> "Assistant":
        """Loads a model, over all devices of this process where there are several.

        Args:
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` wrote, or a
            folder with the released layout.
          variant: of PyTorch weights without a config.json, one of `understanding.VARIANTS`.
          tokenizer: of images; a training run knows where it was.
          tokenizer_variant: which model a PyTorch tokenizer is.
          text_tokenizer: a folder or "bytes"; a training run knows; for a folder with the released
            layout it is the folder.
          template, system, image_mode: as in training; a training run knows.
          step: which checkpoint of a workdir; the newest when None.
          dtype: "float32", "bfloat16", or "auto": the first on CPU and the second elsewhere.

        Raises:
          ValueError: weights that do not fit, something that has to be said, or another tokenizer
            than the model was trained with.
        """
        path = os.fspath(path)
        dtype = api.language_model_dtype(dtype)
        config, known = _torch_config(path, variant)
        source = conversion.open_source(path, PART, config, step=step)
        known = source.saved or known
        data = known.get("data", {})
        tokenizer = api.load_tokenizer_of(
            path, known.get("tokenizer", {}), tokenizer, tokenizer_variant
        )
        text_tokenizer = text_tokenizer or known.get("text_tokenizer")
        if not text_tokenizer:
            raise ValueError(f"{path} does not say which text tokenizer it reads: give it")
        if system is None and data.get("own_system"):
            system = data["system"]
        device_mesh, keep = mesh.answering_mesh(), jnp.dtype(dtype)
        arrays = ((name, np.asarray(t.read(), keep)) for name, t in source.arrays.items())
        return cls(
            source.config,
            unflatten(mesh.place_parameters(arrays, device_mesh)),
            tokenizer,
            load_text_tokenizer(text_tokenizer),
            templates.get_template(template or data.get("template", "qwen_2_5"), system),
            image_mode or data.get("image_mode", "pad"),
            dtype,
            max(data.get("max_length", 0), 2048),
            device_mesh,
        )

    @property
    def vectors(self) -> int:
        """Vectors of an image."""
        return vectors_per_image(self.tokenizer.config.pyramid, self.config.strategy)

    @functools.cached_property
    def _model(self) -> Understanding:
        return Understanding(self.config, jnp.dtype(self.dtype))

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        """Jitted functions, made once."""
        model, strategy, scales = self._model, self.config.strategy, self.tokenizer.config.pyramid
        read = lambda codes, books: visual_features(codes, books, scales, strategy)  # noqa: E731
        begin = lambda p, prompt, key, how: start(model, p, prompt, key, how)  # noqa: E731
        whole = lambda p, prompt, key, how: answer(model, p, prompt, key, how)  # noqa: E731
        onward = lambda p, state, how: step(model, p, state, how)  # noqa: E731
        rate = lambda p, *arrays: model.apply({"params": p}, *arrays, method="likelihood")  # noqa: E731
        compiled = {
            "likelihood": jax.jit(rate),
            "start": jax.jit(begin, static_argnums=3),
            "answer": jax.jit(whole, static_argnums=3),
            "step": jax.jit(onward, static_argnums=2, donate_argnums=1),
        }
        if self.device_mesh is not None:
            bind = functools.partial(mesh.bind, self.device_mesh)
            compiled = {name: bind(function) for name, function in compiled.items()}
        return compiled | {"features": jax.jit(read)}

    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """What the language model reads of pictures: float32 (images, N, C).

        Args:
          pictures: paths, PIL images or uint8 (H, W, 3), of any size.
        """
        size = self.tokenizer.config.image_size
        arrays = [conversations.fit_image(_pixels(p), size, self.image_mode) for p in pictures]
        codes = self.tokenizer.encode(np.stack(arrays))
        books = Codebooks(
            self.tokenizer.params["semantic_codebook"], self.tokenizer.params["pixel_codebook"]
        )
        return np.asarray(self._compiled["features"](codes, books))

    def decoding(self, max_new: int, temperature: float, top_k: int, top_p: float) -> Decoding:
        """How answers are chosen, with this model's stop ids."""
        pad = self.text_tokenizer.pad_token_id
        stops = self.template.stop_ids(self.text_tokenizer)
        return Decoding(max_new, stops, pad or 0, temperature, top_k, top_p)

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
        """Answers one question, or several at once.

        Args:
          question: a text, or a list of them.
          image: the picture, or a list of them; with several questions one entry for each, None
            for a text-only one.
          max_new: tokens of an answer at most.
          temperature: 0 takes the most likely token.
          top_k, top_p: filters of the draws, 0 is off.
          seed: of the draws.

        Returns:
          The answer, or the answers.

        Raises:
          ValueError: a question that is too long, or pictures that cannot be read.
        """
        single = isinstance(question, str)
        asked = [question] if single else list(question)
        shown = [image] if single else list(image or [None] * len(asked))
        if len(shown) != len(asked):
            raise ValueError(f"{len(asked)} questions and {len(shown)} images: one for each")
        own = [_list(i) for i in shown]
        turns = [[_ask(q, len(i))] for q, i in zip(asked, own, strict=True)]
        how = self.decoding(max_new, temperature, top_k, top_p)
        prompt = self._prompt(turns, own, max_new)
        ids = self._compiled["answer"](self.params, prompt, jax.random.key(seed), how)
        texts = [
            questions.answer_text(self.text_tokenizer, ids_N, how.stop_ids)
            for ids_N in np.asarray(ids)
        ]
        return texts[0] if single else texts

    def chat(self) -> "Chat":
        """Begins a conversation."""
        return Chat(self)

    def stream(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], how: Decoding, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the answer to a conversation as they come; see `Chat.stream`."""
        prompt = self._prompt([list(turns)], [list(pictures)], how.max_new)
        state: AnswerState = self._compiled["start"](self.params, prompt, jax.random.key(seed), how)
        said = ""
        for count in range(1, how.max_new + 1):
            state = self._compiled["step"](self.params, state, how)
            ids_N = np.asarray(state.ids_BN)[0, :count]  # a slice on the device would be compiled
            done = bool(state.done_B[0])
            text = questions.answer_text(self.text_tokenizer, ids_N, how.stop_ids)
            # A character of several tokens waits for the last of them.
            if text.startswith(said) and (done or not text.endswith(_UNFINISHED)):
                if text != said:
                    yield text[len(said) :]
                said = text
            if done:
                return

    def _prompt(
        self, turns: Sequence[Sequence[Turn]], pictures: Sequence[Sequence[Picture]], max_new: int
    ) -> dict[str, np.ndarray]:
        """Rows, padded on the left to one of few lengths, and their pictures' features."""
        room = self.max_length - max_new
        rows = [
            questions.question_row(self.template, self.text_tokenizer, t, self.vectors, room)
            for t in turns
        ]
        longest = max(len(row["ids"]) for row in rows)
        prompt = insertion.pad_rows(rows, -(-longest // _ROUND) * _ROUND, "left")
        del prompt["labels"]
        return {**prompt, "features": self._features_of_rows(pictures)}

    def _features_of_rows(self, pictures: Sequence[Sequence[Picture]]) -> np.ndarray:
        """Features of each row's pictures, float32 (B, M, N, C), zero where it has fewer."""
        most = max([1, *map(len, pictures)])
        shape = (len(pictures), most, self.vectors, self.config.vision_channels)
        features = np.zeros(shape, np.float32)
        flat = [picture for own in pictures for picture in own]
        found = iter(self.features(flat)) if flat else iter(())
        for i, own in enumerate(pictures):
            for j in range(len(own)):
                features[i, j] = next(found)
        return features

    def likelihood(
        self,
        asked: Sequence[str],
        pictures: Sequence[Picture | None],
        answers: Sequence[str],
    ) -> list[tuple[float, bool]]:
        """How likely answers are, for benchmarks that rank options.

        Args:
          asked, pictures: as of `answer`, several at once.
          answers: one for each.

        Returns:
          For each the log probability of all ids that carry loss in training, and whether each of
          them is the most likely one.
        """
        own, rows = [_list(picture) for picture in pictures], []
        for question, shown, text in zip(asked, own, answers, strict=True):
            turns = [_ask(question, len(shown)), (GPT, text)]
            tokens = self.template.tokenize(self.text_tokenizer, turns)
            rows.append(insertion.merge_row(tokens.ids_L, tokens.labels_L, self.vectors))
        longest = max(len(row["ids"]) for row in rows)
        batch = insertion.pad_rows(rows, -(-longest // _ROUND) * _ROUND)
        arrays = [batch[name] for name in ("ids", "labels", "places", "segments")]
        found, right = self._compiled["likelihood"](
            self.params, *arrays, self._features_of_rows(own)
        )
        return list(zip(np.asarray(found).tolist(), np.asarray(right).tolist(), strict=True))


class Chat:
    """A conversation; a question may bring a picture.

    Attributes:
      turns: what was said so far.
      pictures: what was shown so far.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []

    def stream(
        self,
        question: str,
        image: Picture | None = None,
        *,
        max_new: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Asks, and gives the answer piece by piece; the turn counts once the answer is complete.

        Args:
          question: the text.
          image: a picture to go with it.
          max_new, temperature, top_k, top_p, seed: see `Assistant.answer`.

        Yields:
          Text.
        """
        new = _list(image)
        turns = [*self.turns, _ask(question, len(new))]
        pictures = [*self.pictures, *new]
        how = self.assistant.decoding(max_new, temperature, top_k, top_p)
        said = ""
        for piece in self.assistant.stream(turns, pictures, how, seed):
            said += piece
            yield piece
        self.turns, self.pictures = [*turns, (GPT, said)], pictures

    def ask(self, question: str, image: Picture | None = None, **options: Any) -> str:
        """Asks, and returns the whole answer; see `stream`."""
        return "".join(self.stream(question, image, **options))


def _list(image: Picture | Sequence[Picture] | None) -> list[Picture]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _ask(question: str, pictures: int) -> Turn:
    text = question.replace(IMAGE, "").strip()
    if not text and not pictures:
        raise ValueError("the question is empty")
    return HUMAN, f"{IMAGE}\n" * pictures + text


def _pixels(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3) of a path, PIL image or array."""
    if isinstance(picture, str | os.PathLike):
        try:
            return images.decode(pathlib.Path(picture).read_bytes())
        except (OSError, images.BrokenImage) as error:
            raise ValueError(f"picture {os.fspath(picture)}: {error}") from error
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"a picture of shape {array.shape} and dtype {array.dtype}: give uint8 (H, W, 3)"
        )
    return array


def _torch_config(
    path: str, variant: str | None
) -> tuple[UnderstandingConfig | None, Mapping[str, Any]]:
    """The config of PyTorch weights, and what their folder says about its tokenizers.

    A checkpoint of ours says both itself.
    """
    if not conversion.is_torch(path):
        return None, {}
    if variant is not None:
        variants = PART.variants
        if variant not in variants:
            raise ValueError(f"variant {variant!r}: one of {', '.join(variants)}")
        return variants[variant], {}
    config, fields = read_understanding_config(path)
    known = {"tokenizer": {"fingerprint": fields.get("tokenflow_fingerprint", "")}}
    return config, known | {"text_tokenizer": path}
