"""Pictures with captions as conversations: a person says the caption, the model draws."""

import os

import numpy as np

from tokenflow_jax.data import sources
from tokenflow_jax.data.chat.conversations import Sample
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE
from tokenflow_jax.data.examples import Broken, evenly_spaced


class CaptionedPictures:
    """A split of pictures, each a conversation about its first caption."""

    def __init__(self, name: str, path: str, split: str, *options):
        """Open a source; the arguments are those of `sources.open_source`."""
        self.name = f"{os.path.basename(os.path.normpath(path))} to draw" if path else name
        self._source = sources.open_source(name, path, split, *options)
        self._places = np.arange(len(self._source))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        place = int(self._places[index])
        caption = self._source[place].get("caption")
        if not caption:
            raise Broken("no caption", "there is nothing to draw it by")
        return Sample(((HUMAN, caption), (GPT, IMAGE)), f"row {place}", True)

    def label(self, index: int) -> str:
        return f"{self.name} {int(self._places[index])}"

    def image_bytes(self, image: str) -> bytes:
        return self._source[int(image.split()[1])]["bytes"]

    def limit(self, count: int) -> None:
        """Keep at most this many samples, evenly spaced."""
        self._places = self._places[evenly_spaced(len(self), count)]
