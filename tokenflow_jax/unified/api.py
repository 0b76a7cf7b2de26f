"""The public Python API of the unified model: it answers, draws, and talks about what it drew.

model = tfx.Unified.load("runs/unified")
model.answer("Which kind of thing is this?", "apple.png")
model.generate("red apple").pictures[0].save("apple.png")
chat = model.chat()
chat.draw("red apple").save("apple.png")
chat.ask("Which kind of thing is this?")
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokenflow_jax.data.chat import drawing, insertion
from tokenflow_jax.data.chat.templates import DRAWN, GPT, HUMAN, IMAGE, Turn, without_markers
from tokenflow_jax.data.pictures import Picture
from tokenflow_jax.generation.api import Generated, Generator
from tokenflow_jax.generation.model import next_scale_features
from tokenflow_jax.generation.sample import Recipe, image_keys
from tokenflow_jax.parallel import mesh, placement
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.inputs import to_pil
from tokenflow_jax.tokenizer.loading import load_model, save_language_model
from tokenflow_jax.understanding.api import Assistant
from tokenflow_jax.understanding.chat import Chat
from tokenflow_jax.unified import model as models
from tokenflow_jax.unified import start
from tokenflow_jax.unified.draw import begin, draw
from tokenflow_jax.unified.names import PART
from tokenflow_jax.unified.session import DrawingSession, DrawnPicture
from tokenflow_jax.weights import conversion


def load_assistant(path: str, variant: str | None = None, **options: Any) -> Assistant:
    """Load a model that answers: a unified one, or one that only reads."""
    kind = Unified if _is_unified(path) else Assistant
    return kind.load(path, variant, **options)


def load_generator(path: str, tokenizer: str | None = None, **options: Any) -> Generator:
    """Load a model that draws: a unified one, or one that only draws."""
    if not _is_unified(path):
        return Generator.load(path, tokenizer, **options)
    options.pop("ema")  # it keeps none
    return Unified.load(path, tokenizer=tokenizer, **options).generator


def _is_unified(path: str) -> bool:
    try:
        return start.stage_of(path) == PART.stage
    except (OSError, ValueError):
        return False  # whoever opens it says what is wrong


@dataclasses.dataclass(frozen=True, repr=False)
class Unified(Assistant):
    """An assistant that draws, too; `generate` and `chat().draw` are what it adds."""

    recipe: Recipe = dataclasses.field(default_factory=Recipe)  # defaults of drawing
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for recipes

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
    ) -> "Unified":
        """Load a model, spread over all devices of this process; see `Assistant.load`."""
        path = os.fspath(path)
        model = load_model(
            path, PART, models.Unified, conversion.variant_config(path, variant, models.VARIANTS),
            tokenizer=tokenizer, tokenizer_variant=tokenizer_variant, step=step, dtype=dtype,
            weights_dtype=weights_dtype,
        )  # fmt: skip
        recipe = Recipe.recorded(model.saved)
        source = {"checkpoint": path, "weights": model.trained.weights}
        how = (text_tokenizer, template, system, image_mode)
        return cls._of(path, model, *how, recipe=recipe, source=source)

    from_pretrained = load

    def _save(self, folder: str | os.PathLike, **options: Any) -> None:
        more = {"data": self.data_settings, "sampling": dataclasses.asdict(self.recipe)}
        save_language_model(self, folder, PART, more, self.text_tokenizer, **options)

    @functools.cached_property
    def prompts(self) -> drawing.DrawingPrompts:
        """The encoder of requests."""
        budget = self.max_length - self.config.pyramid.tokens
        return drawing.DrawingPrompts(
            self.text_tokenizer, budget, self.template, self.config.image_start
        )

    @functools.cached_property
    def generator(self) -> Generator:
        """The model as one that draws alone."""
        return Generator(
            self.config, self.params, self.tokenizer, self.prompts, self.recipe, self.dtype,
            self.source, self.device_mesh, self.trained, self._module,
        )  # fmt: skip

    @property
    def _module(self) -> models.Unified:
        return self.model or models.Unified(self.config, jnp.dtype(self.dtype))

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable]:
        own = {
            # Guided, the cache becomes one of two rows, which cannot take its place.
            "begin": jax.jit(functools.partial(begin, self._module), static_argnames="room"),
            "draw": jax.jit(
                functools.partial(draw, self._module),
                static_argnames="passes",
                donate_argnums=2,
                compiler_options=placement.fast_to_compile(),
            ),
        }
        if self.device_mesh is not None:
            own = {name: mesh.bind(self.device_mesh, function) for name, function in own.items()}
        codebooks, config = self.tokenizer.codebooks, self.config
        next_scale = jax.jit(lambda codes_MN: next_scale_features(codes_MN, codebooks, config))
        return super()._compiled | own | {"next_scale": next_scale}

    def generate(self, prompts: str | Sequence[str], **options: Any) -> Generated:
        """Draw pictures, each in a conversation of its own; see `Generator.generate`."""
        return self.generator.generate(prompts, **options)

    def chat(self) -> "DrawingChat":
        """Start a conversation."""
        return DrawingChat(self)

    def session(self) -> DrawingSession:
        """Begin a conversation's cache."""
        arguments = (self._compiled, self.params, self.vectors, self._row_features)
        return DrawingSession(*arguments, codes=self.config.pyramid.tokens)

    def draw_next(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture | DrawnPicture],
        recipe: Recipe,
        session: DrawingSession,
    ) -> DrawnPicture:
        """Draw the picture with which a conversation ends, its last turn."""
        recipe.check(self.config)
        row = self._row(turns, 0)  # it has the picture's codes
        first = int((row["places"] < insertion.TEXT).sum()) - self.config.pyramid.tokens
        stop = int(np.argmax(row["places"] == insertion.code_places(first, 1))) + 1
        row = {name: array[:stop] for name, array in row.items()}
        empty = self.prompts.encode("")
        empty_1P = empty[empty != self.prompts.pad_id][None] if recipe.guidance > 0 else None
        key_1 = image_keys([turns[-2][1]], [0], recipe.seed)
        codebooks = self.tokenizer.codebooks
        codes_N = session.draw(row, pictures, codebooks, empty_1P, key_1, recipe)
        return DrawnPicture(self.generator.decode(codes_N[None])[0], codes_N)

    def codes(self, pictures: Sequence[Picture | DrawnPicture]) -> np.ndarray:
        """Return the codes of pictures, of drawn ones those they were drawn with."""
        given = [p for p in pictures if not isinstance(p, DrawnPicture)]
        found = iter(super().codes(given) if given else ())
        return np.stack(
            [p.codes_N if isinstance(p, DrawnPicture) else next(found) for p in pictures]
        )

    def _row_features(self, pictures: Sequence[Sequence[Picture]]) -> dict[str, np.ndarray]:
        return {"read": super()._row_features(pictures)}

    @property
    def drawn(self) -> insertion.Drawn:
        """What a drawn picture becomes in a row."""
        prompts = self.prompts
        return insertion.Drawn(self.config.pyramid.tokens, prompts.open_ids, prompts.close_ids)


class DrawingChat(Chat):
    """A conversation in which the model draws, too, and can be asked about what it drew."""

    def draw(self, request: str, *, seed: int = 0, **changes: Any) -> Image.Image:
        """Ask for a picture; later turns see it.

        Args:
          request: a text as those that the model was trained with.
          seed, **changes: to the default recipe: guidance, passes, history.
        """
        if "negative_prompt" in changes:
            raise ValueError("a chat is guided away from an empty request: no negative_prompt")
        recipe = dataclasses.replace(self.assistant.recipe, seed=seed, **changes)
        turns, pictures = (self.turns, self.pictures) if recipe.history else ([], [])
        new = (HUMAN, without_markers(request))
        what = ([*turns, new, (GPT, DRAWN)], pictures, recipe, self._session)
        picture = self.assistant.draw_next(*what)
        self.turns = [*self.turns, new, (GPT, DRAWN + IMAGE)]
        self.pictures = [*self.pictures, picture]
        return to_pil(picture.image_HWC[None])[0]
