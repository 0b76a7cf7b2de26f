"""Text tokenizers, and the fixed prefix of an image that a prompt becomes.

    [pad ... pad, start, text]  <img>  codes of the image  </img>  end
     `budget` ids, left-padded  `open`  `image_start + code` `close`

`<img>` and `</img>` are ordinary text, so that a pretrained vocabulary needs no new rows for them.
Text ids come first, then one for padding where the vocabulary has none of its own, then the codes.

A text tokenizer has this part of transformers' interface: `encode(text, add_special_tokens=)`,
`decode(ids, skip_special_tokens=)`, `bos_token_id`, `eos_token_id`, `pad_token_id` and `len`.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data.built_in_text import BUILT_IN, CLOSE, OPEN
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, shown

_SHORTEST = 8  # prefixes for sampling are at least this long
_PROBE = "a red apple"  # comes back from every usable text tokenizer


# Endings of what a model's folder holds beside its text tokenizer.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def load_text_tokenizer(name: str | os.PathLike) -> Any:
    """Open a built-in tokenizer, or a folder with the one of a Hugging Face model."""
    name = os.fspath(name)
    if name in BUILT_IN:
        return BUILT_IN[name]()
    folder = remote.local_copy(name, without=_WEIGHTS)
    if not os.path.isdir(folder):
        raise ValueError(
            f"text tokenizer {name!r} is not {', '.join(map(repr, BUILT_IN))} or a folder; give "
            "the one that holds tokenizer.json or tokenizer.model of a Hugging Face model"
        )
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the text tokenizer in {name} needs the package transformers: "
            "pip install 'tokenflow_jax[text]'"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        probe = tokenizer.decode(tokenizer.encode(_PROBE), skip_special_tokens=True)
    except Exception as error:  # a broken file can raise anything
        raise ValueError(
            f"{name} holds no text tokenizer that transformers can open without running code of "
            f"that folder: {one_line(error)}"
        ) from error
    if probe.lower().split() != _PROBE.split():
        raise ValueError(
            f"the text tokenizer in {name} turns {_PROBE!r} into {probe[:80]!r}: its vocabulary is "
            "missing; add tokenizer.json or tokenizer.model"
        )
    return tokenizer


def encodable(text: str) -> str:
    """Return a text in which "?" stands for halves of surrogate pairs, which have no UTF-8.

    Raises:
      ValueError: it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"text is wanted, not {type(text).__name__}: {shown(text)}")
    return text.encode(errors="replace").decode()


@dataclasses.dataclass
class PromptIds:
    """The ids around a prompt."""

    budget: int  # number of ids of a padded prompt, the start id included
    start_id: int  # the tokenizer's start, or its end id where it has no start
    end_id: int  # of the whole sequence
    pad_id: int  # stands for nothing else: the tokenizer's, or one past its last
    open_ids: tuple[int, ...]  # `<img>`
    close_ids: tuple[int, ...]  # `</img>`
    image_start: int  # code 0; all ids below are text and padding

    def __post_init__(self):
        if self.budget < 1:
            raise ValueError(f"text budget {self.budget} must be at least 1, for the start id")

    @property
    def prefix_length(self) -> int:
        """The number of ids of a prefix: the budget and `<img>`."""
        return self.budget + len(self.open_ids)

    @property
    def suffix(self) -> tuple[int, ...]:
        """The ids after the codes: `</img>` and the end."""
        return (*self.close_ids, self.end_id)


def llama2_ids(budget: int) -> PromptIds:
    """Return the ids of LLaMA-2's vocabulary, for shapes without its files."""
    return PromptIds(budget, 1, 2, 32000, (529, 2492, 29958), (1533, 2492, 29958), 32001)


class PromptEncoder(PromptIds):
    """An encoder of prompts as prefixes of one length; its tokenizer must have an end id."""

    def __init__(self, text_tokenizer: Any, budget: int):
        end, start = text_tokenizer.eos_token_id, text_tokenizer.bos_token_id
        if end is None:
            raise ValueError("the text tokenizer has no end id (eos_token); prompts need one")
        start = end if start is None else start
        size, pad = len(text_tokenizer), text_tokenizer.pad_token_id
        own = pad is not None and pad not in (start, end)
        marks = (tuple(text_tokenizer.encode(m, add_special_tokens=False)) for m in (OPEN, CLOSE))
        pad, image_start = (pad, size) if own else (size, size + 1)
        super().__init__(budget, start, end, pad, *marks, image_start)
        self.text_tokenizer = text_tokenizer
        self._lock = threading.Lock()
        self._cut: dict[int, int] = {}  # hash of a prompt -> its length
        self._example = ""

    def encode(self, prompt: str) -> np.ndarray:
        """Return the prefix of a prompt, int32 (prefix_length,): padding, start, text, `<img>`.

        A prompt that is too long loses its end, is named in the log (the first one) and counted.
        """
        ids = list(self.text_tokenizer.encode(encodable(prompt), add_special_tokens=True))
        ids = ids if ids and ids[0] == self.start_id else [self.start_id, *ids]
        if len(ids) > self.budget:
            self._note_cut(prompt, len(ids))
        ids = ids[: self.budget]
        return np.array([*[self.pad_id] * (self.budget - len(ids)), *ids, *self.open_ids], np.int32)

    def encode_all(self, prompts: Sequence[str], shortest: bool = False) -> np.ndarray:
        """Return the prefixes of prompts, int32 (B, prefix_length), or at the `shortest` width.

        Widths are powers of two. Positions are relative, so a model gives the same for less work.
        """
        ids_BP = np.stack([self.encode(prompt) for prompt in prompts])
        if not shortest:
            return ids_BP
        longest = int((ids_BP != self.pad_id).sum(axis=1).max()) - len(self.open_ids)
        width = min(self.budget, max(_SHORTEST, 1 << (longest - 1).bit_length()))
        return ids_BP[:, self.budget - width :]

    def _note_cut(self, prompt: str, length: int) -> None:
        with self._lock:
            self._cut[hash(prompt)] = length
            if self._example:
                return
            self._example = f"{prompt[:40]!r}..."
        log.warning(
            "a prompt of %d ids is cut to the %d of the text budget: %s",
            length, self.budget, self._example,
        )  # fmt: skip

    def cut_notes(self) -> list[str]:
        """Return a line on the prompts that were too long; empty when none was."""
        with self._lock:
            lengths, example = list(self._cut.values()), self._example
        if not lengths:
            return []
        return [
            f"{len(lengths)} different prompts were longer than the {self.budget} ids of the text "
            f"budget and lost their end (the longest has {max(lengths)}), for example "
            f"{example}"
        ]
