"""Conversation templates: turns as the text of a prompt, its ids, and the labels of a loss.

    template = get_template("vicuna_v1")
    tokens = template.tokenize(text_tokenizer, turns)    # training: ids_L and labels_L
    ids_L = template.prompt_ids(text_tokenizer, turns)   # inference: the answer begins at the end

Turns are (role, text) with role "human" or "gpt"; an image stands where the text has `<image>`, as
id IMAGE_ID. Labels are the ids that carry loss and IGNORE elsewhere, not shifted. The four families
behave as the reference does (docs/reference.md, section 5), its oddities included:

    plain     the image and the answer; the question is left out. Loss on answer and newline.
    vicuna    `system USER: q ASSISTANT: a</s>USER: ...`. Loss on each answer with its end.
    llama_2   `[INST] <<SYS>>...<</SYS>>\\n\\nq [/INST] a </s><s>[INST] ...`; the same loss.
    chatml    blocks `<|im_start|>role\\n...<|im_end|>\\n`, encoded one by one. Loss on the whole
              assistant blocks and, everywhere, on the two marks and on single newlines.

A text tokenizer is described in `data.text`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenflow_jax.data.text import encodable

IMAGE = "<image>"
IMAGE_ID = -200
# Where the model draws the picture; no character of Unicode, and left out of all texts.
DRAWN = "\ufdd0"
DRAWN_ID = -201
IGNORE = -100
HUMAN, GPT = "human", "gpt"
_START, _END = "<s>", "</s>"
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
_POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

Turn = tuple[str, str]


class Tokens(NamedTuple):
    """A conversation as ids, int32."""

    ids_L: np.ndarray  # IMAGE_ID where an image goes
    labels_L: np.ndarray  # the id where it carries loss, else IGNORE


@dataclasses.dataclass(frozen=True)
class Template:
    """A way to write turns as one text, of a family (see the module) and with a system prompt."""

    name: str
    family: str
    system: str = ""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the text of alternating turns; after a last question the answer's header."""
        return "".join(getattr(self, f"_{self.family}_pieces")(turns))

    def tokenize(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        """Return the ids and labels of a whole conversation, turns of `prepare_turns`."""
        check_roles(turns)
        tokenize = {"plain": self._tokenize_plain, "chatml": self._tokenize_chatml}
        return tokenize.get(self.family, self._tokenize_rounds)(text_tokenizer, turns)

    def prompt_ids(self, text_tokenizer: Any, turns: Sequence[Turn]) -> np.ndarray:
        """Return the int32 ids that an answer continues; the human's turns are first and last."""
        return np.array(_encode(text_tokenizer, self.prompt(turns)), np.int32)

    def stop_ids(self, text_tokenizer: Any) -> tuple[int, ...]:
        """Return the ids that end an answer: of the text, and of its block or line."""
        marks = {"chatml": [_IM_END], "plain": ["\n"]}.get(self.family, [])
        ids = {text_tokenizer.eos_token_id, *(_single(text_tokenizer, mark) for mark in marks)}
        return tuple(sorted(ids - {None}))

    def _plain_pieces(self, turns: Sequence[Turn]) -> list[str]:
        # A single turn is a question that waits for its answer.
        return [turns[0][1] + "\n"] if len(turns) == 1 else [IMAGE, turns[1][1] + "\n"]

    def _vicuna_pieces(self, turns: Sequence[Turn]) -> list[str]:
        pieces = [f"{self.system} "] if self.system else []
        for role, text in turns:
            pieces.append(f"USER: {text} " if role == HUMAN else f"ASSISTANT: {text}{_END}")
        return [*pieces, "ASSISTANT:"] if turns[-1][0] == HUMAN else pieces

    def _llama_2_pieces(self, turns: Sequence[Turn]) -> list[str]:
        pieces = []
        for i, (role, text) in enumerate(turns):
            if i == 0 and self.system:
                text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            start = _START if i else ""
            pieces.append(f"{start}[INST] {text} [/INST]" if role == HUMAN else f" {text} {_END}")
        return pieces

    def _chatml_pieces(self, turns: Sequence[Turn]) -> list[str]:
        blocks = [("system", self.system)] if self.system else []
        blocks += [("user" if role == HUMAN else "assistant", text) for role, text in turns]
        pieces = [f"{_IM_START}{role}\n{text}{_IM_END}\n" for role, text in blocks]
        return [*pieces, f"{_IM_START}assistant\n"] if turns[-1][0] == HUMAN else pieces

    def _tokenize_plain(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        if len(turns) != 2 or IMAGE not in turns[0][1]:
            raise ValueError(
                f"template {self.name!r} takes one question with an {IMAGE} and one answer; these "
                f"are {len(turns)} turns"
            )
        ids = _encode(text_tokenizer, self.prompt(turns))
        return _labeled(ids, [(len(_encode(text_tokenizer, IMAGE)), len(ids))])

    def _tokenize_rounds(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        # Each round (one per answer) is counted on its own. Where the counts do not add up to the
        # whole, for example when a question contains the answer's header, nothing carries loss.
        text = self.prompt(turns)
        ids = _encode(text_tokenizer, text)
        header = " ASSISTANT: " if self.family == "vicuna" else "[/INST] "
        end = len(_encode_piece(text_tokenizer, _END, start=False))
        position = _start_length(text_tokenizer, ids)
        spans = []
        for piece in text.split(_END):
            parts = piece.split(header)
            if not piece or len(parts) != 2:
                break
            # The header's last space belongs to the answer's first token.
            question = _own_length(text_tokenizer, parts[0] + header) - 1
            length = _own_length(text_tokenizer, piece) + end
            spans.append((position + question, position + length))
            position += length
        return _labeled(ids, spans if position == len(ids) else [])

    def _tokenize_chatml(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        marked = {_single(text_tokenizer, mark) for mark in (_IM_START, _IM_END, "\n")} - {None}
        ids, labels = [], []
        answers = [False] * bool(self.system) + [role == GPT for role, _ in turns]
        for piece, answer in zip(self._chatml_pieces(turns), answers, strict=True):
            new = _encode(text_tokenizer, piece, start=False)
            ids += new
            labels += [i if i != IMAGE_ID and (answer or i in marked) else IGNORE for i in new]
        return Tokens(np.array(ids, np.int32), np.array(labels, np.int32))


_ALL = (
    Template("plain", "plain"),
    Template("vicuna_v1", "vicuna", _POLITE.format("user")),
    Template("llava_v1", "vicuna", _POLITE.format("human")),
    Template("llama_2", "llama_2", _LLAMA_2),
    Template("llava_llama_2", "llama_2", _LLAVA_LLAMA_2),
    Template("qwen_2_5", "chatml", "You are a helpful assistant."),
)
TEMPLATES = {template.name: template for template in _ALL}


def get_template(name: str, system: str | None = None) -> Template:
    """Return one of TEMPLATES; `system` replaces its system prompt unless it is None."""
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r} is not one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return template if system is None else dataclasses.replace(template, system=system)


def prepare_turns(turns: Sequence[Turn], has_image: bool, draws: bool = False) -> list[Turn]:
    """Leave one image marker in front of turns that have any; drop a first turn of the model.

    With `draws` a marker in a turn of the model's is a picture that it draws, in its place. If
    anything follows, an image marker behind it shows the finished picture.
    """
    turns = [(role, text.replace(DRAWN, "")) for role, text in turns]
    if draws:
        turns = [_drawn(turns, i) for i in range(len(turns))]
    if has_image:
        turns = [(role, text if DRAWN in text else _marked(text)) for role, text in turns]
    return list(turns[1:] if turns and turns[0][0] != HUMAN else turns)


def _marked(text: str) -> str:
    """Return a text with one marker, in front, if it has any."""
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text


def _drawn(turns: Sequence[Turn], place: int) -> Turn:
    role, text = turns[place]
    if role != GPT or IMAGE not in text:
        return role, text
    before, after = text.split(IMAGE, 1)
    more = IMAGE if after.strip() or place + 1 < len(turns) else ""
    return role, f"{before}{DRAWN}{more}{after}"


def without_markers(text: str) -> str:
    """Return a text that stands for no picture, and has an encoding."""
    return encodable(text).replace(DRAWN, "").replace(IMAGE, "")


def check_roles(turns: Sequence[Turn]) -> None:
    """Raise ValueError unless turns alternate, human first, and end with an answer."""
    roles = [role for role, _ in turns]
    if not roles or len(roles) % 2 or roles != [HUMAN, GPT] * (len(roles) // 2):
        raise ValueError(
            f"the turns are by {', '.join(roles) or 'no one'}; they must alternate, {HUMAN} first, "
            f"and end with {GPT}"
        )


def _labeled(ids: list[int], spans: Sequence[tuple[int, int]]) -> Tokens:
    ids_L = np.array(ids, np.int32)
    labels_L = np.full(len(ids), IGNORE, np.int32)
    for start, stop in spans:
        labels_L[start:stop] = ids_L[start:stop]
    return Tokens(ids_L, labels_L)


def _encode(text_tokenizer: Any, text: str, start: bool = True) -> list[int]:
    """Encode the pieces between markers; a start id, if any, stands in front only."""
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"({IMAGE}|{DRAWN})", text)):
        if i % 2:
            ids.append(IMAGE_ID if piece == IMAGE else DRAWN_ID)
            continue
        new = _encode_piece(text_tokenizer, piece, start)
        skip = _start_length(text_tokenizer, new) if i and start else 0
        ids += new[skip:]
    return ids


def _encode_piece(text_tokenizer: Any, text: str, start: bool) -> list[int]:
    """Encode text in which the templates' marks are single ids, where they exist."""
    for mark, own in ((_START, text_tokenizer.bos_token_id), (_END, text_tokenizer.eos_token_id)):
        if own is None or mark not in text or _single(text_tokenizer, mark) == own:
            continue
        # A tokenizer that does not read it in text (bytes), or whose own is spelled differently.
        ids: list[int] = []
        for i, piece in enumerate(text.split(mark)):
            ids += [own] * bool(i)
            ids += _encode_piece(text_tokenizer, piece, start and i == 0)
        return ids
    return list(text_tokenizer.encode(text, add_special_tokens=start))


def _start_length(text_tokenizer: Any, ids: Sequence[int]) -> int:
    """Return 1 if ids begin with a start id that the tokenizer puts before every text, else 0."""
    own = text_tokenizer.bos_token_id
    first = list(text_tokenizer.encode("", add_special_tokens=True))
    return int(own is not None and first[:1] == [own] and list(ids[:1]) == [own])


def _own_length(text_tokenizer: Any, text: str) -> int:
    ids = _encode(text_tokenizer, text)
    return len(ids) - _start_length(text_tokenizer, ids)


def _single(text_tokenizer: Any, mark: str) -> int | None:
    """Return the id of a mark that is one token, else None."""
    ids = list(text_tokenizer.encode(mark, add_special_tokens=False))
    return ids[0] if len(ids) == 1 else None
