"""The text tokenizers that need no file: UTF-8 bytes, hashed words, and words with bytes.

They have the part of transformers' interface that `data.text` names.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

OPEN, CLOSE = "<img>", "</img>"
_VOCABULARY = Path(__file__).parents[1] / "assets" / "words.txt"


class _BuiltIn:
    """A tokenizer that needs no file."""

    pad_token_id = unk_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    _SPECIAL = ("<pad>", "<s>", "</s>")
    _OFFSET = len(_SPECIAL)
    _IDS: int  # without the special ones

    def __len__(self) -> int:
        return self._IDS + self._OFFSET

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, after the start id if `add_special_tokens`."""
        ids = [i + self._OFFSET for i in self._pieces(text)]
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def _checked(self, ids: Sequence[int]) -> Iterator[int]:
        for i in map(int, ids):
            if not 0 <= i < len(self):
                raise ValueError(
                    f"id {i} is not one of the text tokenizer {self.name_or_path}, which has "
                    f"0 to {len(self) - 1}"
                )
            yield i


class ByteTokenizer(_BuiltIn):
    """UTF-8 bytes as ids: byte b is b + 3; knows every language."""

    name_or_path = "bytes"
    _IDS = 256

    def _pieces(self, text: str) -> bytes:
        return text.encode(errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; broken UTF-8 becomes U+FFFD."""
        parts = []
        for i in self._checked(ids):
            if i >= self._OFFSET:
                parts.append(bytes([i - self._OFFSET]))
            elif not skip_special_tokens:
                parts.append(self._SPECIAL[i].encode())
        return b"".join(parts).decode(errors="replace")


class WordTokenizer(_BuiltIn):
    """Whole words (`<img>` is one, and any sign) as ids, by a hash of their case-folded letters.

    A small model learns words far faster than bytes, but those that were not in its captions mean
    nothing to it, few share an id, and ids cannot be turned back into words.
    """

    name_or_path = "words"
    _IDS = 4093  # a prime

    def _pieces(self, text: str) -> list[int]:
        words = re.findall(r"</?img>|[^\W_]+|[^\w\s]|_", text.casefold())
        return [zlib.crc32(word.encode(errors="replace")) % self._IDS for word in words]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return ids for people: "#17" for a word."""
        shown = [self._SPECIAL[i] if i < self._OFFSET else f"#{i}" for i in self._checked(ids)]
        return " ".join(s for s in shown if not (skip_special_tokens and s in self._SPECIAL))


class WordsAndBytes(_BuiltIn):
    """The words of the emoji's names and tags as ids, everything else as UTF-8 bytes.

    A word stands for itself behind a space; before it, an id says that there is no space, and
    another one that it begins with a capital. So texts come back as they were.
    """

    name_or_path = "words_and_bytes"
    _FIRST = 256  # what follows the bytes: the two signs, the words

    def __init__(self):
        words = _VOCABULARY.read_text(encoding="utf-8").split()
        self._joined, self._capital = self._FIRST, self._FIRST + 1
        self._words = [OPEN, CLOSE, *words]
        self._ids = {word: self._FIRST + 2 + i for i, word in enumerate(self._words)}
        self._IDS = self._FIRST + 2 + len(self._words)

    def _pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.findall(r"</?img>| ?[^\W\d_]+|.", text, re.DOTALL):
            ids += self._piece(piece)
        return ids

    def _piece(self, piece: str) -> Sequence[int]:
        word = piece.removeprefix(" ")
        lower = word[:1].lower() + word[1:]
        signs = [] if piece != word or word in (OPEN, CLOSE) else [self._joined]
        if word in self._ids:
            return [*signs, self._ids[word]]
        if lower in self._ids and lower[:1].upper() + lower[1:] == word:
            return [*signs, self._capital, self._ids[lower]]
        return piece.encode(errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; broken UTF-8 becomes U+FFFD."""
        text, space, capital = b"", " ", False
        for i in self._checked(ids):
            piece = i - self._OFFSET
            if piece == self._joined:
                space = ""
            elif piece == self._capital:
                capital = True
            elif piece > self._capital:
                word = self._words[piece - self._capital - 1]
                space = "" if word in (OPEN, CLOSE) else space
                word = word[:1].upper() + word[1:] if capital else word
                text, space, capital = text + (space + word).encode(), " ", False
            elif piece >= 0:
                text += bytes([piece])
            elif not skip_special_tokens:
                text += self._SPECIAL[i].encode()
        return text.decode(errors="replace")


BUILT_IN = {cls.name_or_path: cls for cls in (ByteTokenizer, WordTokenizer, WordsAndBytes)}
