"""Conversation templates: from turns to the prompt's text, its ids, and which of them are learnt.

    template = get_template("vicuna_v1")
    tokens = template.tokenize(text_tokenizer, turns)    # training: ids_L and labels_L
    ids_L = template.prompt_ids(text_tokenizer, turns)   # inference: the answer begins at the end

Turns are (role, text) with role "human" or "gpt"; an image stands where the text has `<image>`, as
id IMAGE_ID. Labels are the ids that carry loss and IGNORE elsewhere, not shifted. The four families
behave as the reference does (golden/README_llm.md, section 4.2), where they differ from what one
would design now included; see `Template`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

IMAGE = "<image>"
IMAGE_ID = -200
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


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A conversation as ids.

    Attributes:
      ids_L: int32, IMAGE_ID where an image goes.
      labels_L: int32, the id where it carries loss, else IGNORE.
    """

    ids_L: np.ndarray
    labels_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns become one text.

    Families:
      plain: the image and the answer; the question is left out. Loss on answer and newline.
      vicuna: `system USER: q ASSISTANT: a</s>USER: ...`. Loss on each answer with its end.
      llama_2: `[INST] <<SYS>>...<</SYS>>\\n\\nq [/INST] a </s><s>[INST] ...`; the same loss.
      chatml: blocks `<|im_start|>role\\n...<|im_end|>\\n`, encoded one by one. Loss on the whole
        assistant blocks and, everywhere, on the two marks and on single newlines.

    Attributes:
      name: what configs call it.
      family: see above.
      system: what the conversation begins with; may be empty.
    """

    name: str
    family: str
    system: str = ""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text of turns; one that ends with the human's ends where the answer begins.

        Args:
          turns: alternating, the human first.
        """
        return "".join(getattr(self, f"_{self.family}_pieces")(turns))

    def tokenize(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        """Ids and labels of a whole conversation.

        Args:
          text_tokenizer: see `data.text`.
          turns: of `prepare_turns`.

        Returns:
          The tokens. All labels are IGNORE where the pieces of the text do not add up to the whole
          (families vicuna and llama_2, for example when a question contains the answer's header).

        Raises:
          ValueError: turns that the template cannot take.
        """
        check_roles(turns)
        if self.family == "plain":
            return self._tokenize_plain(text_tokenizer, turns)
        if self.family == "chatml":
            return self._tokenize_chatml(text_tokenizer, turns)
        return self._tokenize_rounds(text_tokenizer, turns)

    def prompt_ids(self, text_tokenizer: Any, turns: Sequence[Turn]) -> np.ndarray:
        """Ids that an answer continues: int32 (L,), IMAGE_ID where an image goes.

        Args:
          text_tokenizer: see `data.text`.
          turns: alternating, beginning and ending with the human's.
        """
        return np.array(encode(text_tokenizer, self.prompt(turns)), np.int32)

    def stop_ids(self, text_tokenizer: Any) -> tuple[int, ...]:
        """Ids that end an answer: the end of the text, and of the block where there are blocks."""
        marks = [_IM_END] if self.family == "chatml" else []
        if self.family == "plain":
            marks = ["\n"]
        ids = {text_tokenizer.eos_token_id, *(_single(text_tokenizer, mark) for mark in marks)}
        return tuple(sorted(ids - {None}))

    def _plain_pieces(self, turns: Sequence[Turn]) -> list[str]:
        if len(turns) == 1:  # a question that waits for its answer
            return [turns[0][1] + "\n"]
        return [IMAGE, turns[1][1] + "\n"]

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
        pieces = [_block("system", self.system)] if self.system else []
        for role, text in turns:
            pieces.append(_block("user" if role == HUMAN else "assistant", text))
        return [*pieces, f"{_IM_START}assistant\n"] if turns[-1][0] == HUMAN else pieces

    def _tokenize_plain(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        if len(turns) != 2 or IMAGE not in turns[0][1]:
            raise ValueError(
                f"template {self.name!r} takes one question with an {IMAGE} and one answer; these "
                f"are {len(turns)} turns"
            )
        ids = encode(text_tokenizer, self.prompt(turns))
        return _labelled(ids, [(len(encode(text_tokenizer, IMAGE)), len(ids))])

    def _tokenize_rounds(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        """One round per answer, each counted on its own: where the counts do not add up, no loss.

        A header ends in a space that the answer's first token takes in.
        """
        text = self.prompt(turns)
        ids = encode(text_tokenizer, text)
        header = "ASSISTANT: " if self.family == "vicuna" else "[/INST] "
        if self.family == "vicuna":
            header = f" {header}"
        end = len(_encode_piece(text_tokenizer, _END, start=False))
        position = _start_length(text_tokenizer, ids)
        spans = []
        for piece in text.split(_END):
            parts = piece.split(header)
            if not piece or len(parts) != 2:
                break
            question = _own_length(text_tokenizer, parts[0] + header) - 1
            length = _own_length(text_tokenizer, piece) + end
            spans.append((position + question, position + length))
            position += length
        return _labelled(ids, spans if position == len(ids) else [])

    def _tokenize_chatml(self, text_tokenizer: Any, turns: Sequence[Turn]) -> Tokens:
        marked = {_single(text_tokenizer, mark) for mark in (_IM_START, _IM_END, "\n")} - {None}
        ids, labels = [], []
        answers = [False] * bool(self.system) + [role == GPT for role, _ in turns]
        for piece, answer in zip(self._chatml_pieces(turns), answers, strict=True):
            new = _encode_marked(text_tokenizer, piece, start=False)
            ids += new
            labels += [i if i != IMAGE_ID and (answer or i in marked) else IGNORE for i in new]
        return Tokens(np.array(ids, np.int32), np.array(labels, np.int32))


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", "plain"),
        Template("vicuna_v1", "vicuna", _POLITE.format("user")),
        Template("llava_v1", "vicuna", _POLITE.format("human")),
        Template("llama_2", "llama_2", _LLAMA_2),
        Template("llava_llama_2", "llama_2", _LLAVA_LLAMA_2),
        Template("qwen_2_5", "chatml", "You are a helpful assistant."),
    )
}


def get_template(name: str, system: str | None = None) -> Template:
    """Returns a template.

    Args:
      name: one of TEMPLATES.
      system: replaces what conversations begin with; "" leaves it out, None keeps it.

    Raises:
      ValueError: an unknown name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r} is not one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return template if system is None else dataclasses.replace(template, system=system)


def prepare_turns(turns: Sequence[Turn], has_image: bool) -> list[Turn]:
    """Puts image markers in front, and drops a first turn that is not the human's.

    In a turn with markers all of them are removed, the rest is stripped, and one marker and a
    newline are put before it.

    Args:
      turns: as they stand in the data.
      has_image: whether there is a picture; without one, text stays as it is.
    """
    turns = [(role, _marker_first(text) if has_image else text) for role, text in turns]
    return turns[1:] if turns and turns[0][0] != HUMAN else turns


def check_roles(turns: Sequence[Turn]) -> None:
    """Raises ValueError unless turns alternate, human first, and end with an answer."""
    roles = [role for role, _ in turns]
    if not roles or len(roles) % 2 or roles != [HUMAN, GPT] * (len(roles) // 2):
        raise ValueError(
            f"the turns are by {', '.join(roles) or 'nobody'}; they must alternate, {HUMAN} first, "
            f"and end with {GPT}"
        )


def _marker_first(text: str) -> str:
    if IMAGE not in text:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _block(role: str, text: str) -> str:
    return f"{_IM_START}{role}\n{text}{_IM_END}\n"


def _labelled(ids: list[int], spans: Sequence[tuple[int, int]]) -> Tokens:
    ids_L = np.array(ids, np.int32)
    labels_L = np.full(len(ids), IGNORE, np.int32)
    for start, stop in spans:
        labels_L[start:stop] = ids_L[start:stop]
    return Tokens(ids_L, labels_L)


def encode(text_tokenizer: Any, text: str) -> list[int]:
    """Encodes text with image markers, the pieces between them one by one.

    Args:
      text_tokenizer: see `data.text`.
      text: a prompt.

    Returns:
      Ids; a start id, where the tokenizer puts one, stands in front only.
    """
    return _encode_marked(text_tokenizer, text, start=True)


def _encode_marked(text_tokenizer: Any, text: str, start: bool) -> list[int]:
    ids: list[int] = []
    for i, piece in enumerate(text.split(IMAGE)):
        new = _encode_piece(text_tokenizer, piece, start)
        skip = _start_length(text_tokenizer, new) if i and start else 0
        ids += [*([IMAGE_ID] if i else []), *new[skip:]]
    return ids


def _encode_piece(text_tokenizer: Any, text: str, start: bool) -> list[int]:
    """Encodes text in which the templates' marks are single ids, where they exist."""
    marks = {_START: text_tokenizer.bos_token_id, _END: text_tokenizer.eos_token_id}
    foreign = {
        mark: i for mark, i in marks.items() if i is not None and mark in text
        and list(text_tokenizer.encode(mark, add_special_tokens=False)) != [i]
    }  # fmt: skip
    if not foreign:
        return list(text_tokenizer.encode(text, add_special_tokens=start))
    # A tokenizer that does not read them in text (bytes), or whose own are spelt otherwise.
    mark, own = next(iter(foreign.items()))
    ids: list[int] = []
    for i, piece in enumerate(text.split(mark)):
        ids += [own] * bool(i)
        ids += _encode_piece(text_tokenizer, piece, start and i == 0)
    return ids


def _start_length(text_tokenizer: Any, ids: Sequence[int]) -> int:
    """1 where ids begin with the start id, which the tokenizer then puts before every text."""
    own = text_tokenizer.bos_token_id
    first = list(text_tokenizer.encode("", add_special_tokens=True))
    return int(own is not None and first[:1] == [own] and list(ids[:1]) == [own])


def _own_length(text_tokenizer: Any, text: str) -> int:
    ids = encode(text_tokenizer, text)
    return len(ids) - _start_length(text_tokenizer, ids)


def _single(text_tokenizer: Any, mark: str) -> int | None:
    """The id of a mark that is one token."""
    ids = list(text_tokenizer.encode(mark, add_special_tokens=False))
    return ids[0] if len(ids) == 1 else None
