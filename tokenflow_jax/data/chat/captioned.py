"""Pictures with captions as conversations: a person says the caption, the model draws."""

import os

import numpy as np

from tokenflow_jax.data import sources
from tokenflow_jax.data.captions.texts import (
    CaptionConfig,
    draw_caption,
    main_caption,
    usable_templates,
)
from tokenflow_jax.data.chat.conversations import Sample
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE
from tokenflow_jax.data.examples import evenly_spaced


class CaptionedPictures:
    """A split of pictures, each a conversation about its first caption, or one that is drawn."""

    def __init__(self, captions: CaptionConfig, name: str, path: str, split: str, *options):
        """Open a source; the other arguments are those of `sources.open_source`."""
        self._captions = captions
        self.name = f"{os.path.basename(os.path.normpath(path))} to draw" if path else name
        self._source = sources.open_source(name, path, split, *options)
        self._places = np.arange(len(self._source))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        return self.varied(index, None)

    def varied(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Return the conversation about a caption that `rng` draws from those of the picture."""
        place = int(self._places[index])
        example = self._source[place]
        if rng is None:
            usable_templates(example, self._captions)  # broken as it is with an rng
            caption = main_caption(example)
        else:
            caption = draw_caption(example, self._captions, rng)
        return Sample(((HUMAN, caption), (GPT, IMAGE)), f"row {place}", True)

    def label(self, index: int) -> str:
        return f"{self.name} {int(self._places[index])}"

    def image_bytes(self, image: str) -> bytes:
        return self._source[int(image.split()[1])]["bytes"]

    def limit(self, count: int) -> None:
        """Keep at most this many samples, evenly spaced."""
        self._places = self._places[evenly_spaced(len(self), count)]
