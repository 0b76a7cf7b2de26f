"""Checks a file of conversations before training on it.

    python -m tokenflow_jax.data.validate chat.jsonl --image_folder=pictures \
        --template=qwen_2_5 --text_tokenizer=Qwen2.5-14B-Instruct --max_length=2048

prints one line per fault, with the number of its line, and a summary. Training skips what is marked
"skipped" and cuts what is marked "cut". Exit codes: 0 no fault, 1 faults, 2 wrong arguments.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenflow_jax.data import conversations, insertion, templates, text
from tokenflow_jax.data.conversations import BrokenSample, Sample
from tokenflow_jax.data.templates import IMAGE, Template


class Fault(NamedTuple):
    """What is wrong with a line.

    Attributes:
      line: its number, from 1.
      reason: a short category.
      detail: what exactly.
      skipped: whether training leaves the conversation out; else it is used, but changed.
    """

    line: int
    reason: str
    detail: str
    skipped: bool = True

    def __str__(self) -> str:
        verdict = "" if self.skipped else " (used all the same)"
        return f"line {self.line}: {self.reason}: {self.detail}{verdict}"


class Checker:
    """Finds the faults of conversations, all of a line's at once."""

    def __init__(
        self,
        template: Template,
        text_tokenizer: Any,
        image_folder: pathlib.Path,
        *,
        vectors: int = 729,
        max_length: int = 2048,
        decode: bool = True,
    ):
        """Sets what to check for.

        Args:
          template, text_tokenizer: of the training.
          image_folder: where the paths of images begin.
          vectors: of an image.
          max_length: of a conversation, vectors included.
          decode: reads and decodes every picture; else it is enough that the file is there.
        """
        self.template, self.text_tokenizer = template, text_tokenizer
        self.folder, self.vectors, self.max_length = image_folder, vectors, max_length
        self.decode = decode
        self._seen: dict[str, BrokenSample | None] = {}

    def faults(self, number: int, line: bytes) -> Iterator[Fault]:
        """The faults of one line."""
        try:
            sample = conversations.parse_line(line)
        except BrokenSample as error:
            yield Fault(number, error.reason, error.detail)
            return
        if sample.image and (error := self._image(sample.image)) is not None:
            yield Fault(number, error.reason, error.detail)
        yield from self._text(number, sample)

    def _text(self, number: int, sample: Sample) -> Iterator[Fault]:
        try:
            conversations.prepare(
                sample, self.template, self.text_tokenizer, self.vectors, self.max_length
            )
        except BrokenSample as error:
            yield Fault(number, error.reason, error.detail)
            return
        first = sample.turns[0][0]
        if first != templates.HUMAN:
            yield Fault(number, "first turn", f"is from {first!r} and is left out", False)
        if any(turn.count(IMAGE) > 1 for _, turn in sample.turns):
            yield Fault(number, "several markers", f"a turn has several {IMAGE}: one stays", False)
        if any(not turn.strip() for role, turn in sample.turns if role == templates.GPT):
            yield Fault(number, "empty answer", "an answer has no text", False)
        turns = templates.prepare_turns(sample.turns, bool(sample.image))
        ids_L = self.template.tokenize(self.text_tokenizer, turns).ids_L
        length = insertion.merged_length(ids_L, self.vectors)
        if length > self.max_length:
            detail = f"{length} tokens, cut to {self.max_length}"
            question_T = self.template.prompt_ids(self.text_tokenizer, turns[:1])
            if insertion.merged_length(question_T, self.vectors) >= self.max_length:
                detail += ", where the first answer has not begun"
            yield Fault(number, "over length", detail, False)

    def _image(self, image: str) -> BrokenSample | None:
        """What is wrong with a picture; each is looked at once."""
        if image not in self._seen:
            self._seen[image] = self._look_at(image)
        return self._seen[image]

    def _look_at(self, image: str) -> BrokenSample | None:
        path = self.folder / image
        try:
            if not path.is_file():
                return BrokenSample("missing image", f"there is no {path}")
            if self.decode:
                conversations.load_image(path.read_bytes(), 8, "square")
        except BrokenSample as error:
            return BrokenSample(error.reason, f"{path}: {error.detail}")
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            return BrokenSample("missing image", f"{image!r}: {error}")
        return None


def check_file(path: pathlib.Path, checker: Checker) -> tuple[int, list[Fault]]:
    """Returns the number of conversations in a file, and all faults."""
    count, faults = 0, []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                count += 1
                faults += checker.faults(number, line)
    if not count:
        faults.append(Fault(1, "empty file", "there are no conversations in it"))
    return count, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the faults of a file; returns the exit code."""
    arguments = _parser().parse_args(argv)
    path = pathlib.Path(arguments.file)
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        folder = pathlib.Path(arguments.image_folder or path.parent)
        if not folder.is_dir():
            raise ValueError(f"--image_folder {folder} is not a folder")
        checker = Checker(
            templates.get_template(arguments.template),
            text.load_text_tokenizer(arguments.text_tokenizer),
            folder,
            vectors=arguments.vectors,
            max_length=arguments.max_length,
            decode=arguments.decode_images,
        )
        count, faults = check_file(path, checker)
    except (ValueError, OSError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    for fault in faults[: arguments.show or None]:
        print(fault)
    if arguments.show and len(faults) > arguments.show:
        print(f"... and {len(faults) - arguments.show} more (--show=0 prints all)")
    kinds = collections.Counter(fault.reason for fault in faults)
    bad = len({fault.line for fault in faults if fault.skipped})
    summary = ", ".join(f"{n} {reason}" for reason, n in kinds.most_common()) or "no faults"
    print(f"{path}: {count} conversations, {bad} of them are skipped in training ({summary})")
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenflow_jax.data.validate",
        description="Checks a file of conversations, one JSON object per line.",
    )
    add = parser.add_argument
    add("file", help="the .jsonl file")
    add("--image_folder", default="", help="where images' paths begin; the file's folder")
    add("--template", default="qwen_2_5", help=f"one of {', '.join(templates.TEMPLATES)}")
    add("--text_tokenizer", default="bytes", help="bytes, or a folder of a Hugging Face model")
    add("--vectors", type=int, default=729, help="vectors of an image (27 x 27)")
    add("--max_length", type=int, default=2048, help="tokens, vectors included")
    add("--show", type=int, default=100, help="faults to print; 0 all")
    add(
        "--decode_images", action=argparse.BooleanOptionalAction, default=True,
        help="decode every picture, not only look whether its file is there",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
