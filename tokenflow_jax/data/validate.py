"""Checks a file of conversations before training on it.

    python -m tokenflow_jax.data.validate chat.jsonl --image_folder=pictures \
        --template=qwen_2_5 --text_tokenizer=Qwen2.5-14B-Instruct --max_length=2048

prints one line per fault, with the number of its line, and a summary. Training skips what is marked
"skipped" and cuts what is marked "cut". Exit codes: 0 no fault, 1 faults, 2 wrong arguments.
"""

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from tokenflow_jax.data import text
from tokenflow_jax.data.chat import conversations, insertion, templates
from tokenflow_jax.data.chat.conversations import BrokenSample, Sample
from tokenflow_jax.data.chat.templates import IMAGE, Template

_LINES_AT_A_TIME = 512
_LARGE = 20 * 10**6  # bytes of a file for which starting processes is worth while
_TELL_EVERY = 10.0  # seconds
_kept: Any = None  # the checker of a process that shares the work


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
            row = conversations.prepare(
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
        if len(row["ids"]) < self.max_length:
            return
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


def check_file(path: pathlib.Path, checker: Checker, processes: int = 1) -> tuple[int, list[Fault]]:
    """Finds the faults of a file; says on stderr how far it is.

    Args:
      path: the file.
      checker: looks at the lines.
      processes: that share the work; each looks at the pictures of its own lines.

    Returns:
      The number of conversations, and all faults in the order of the lines.
    """
    count, faults, seen = 0, [], 0
    began = told = time.monotonic()
    size = path.stat().st_size
    with path.open("rb") as file:
        for part in _checked(_parts(file), checker, processes):
            count, seen = count + part.conversations, seen + part.nbytes
            faults += part.faults
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                left = (told - began) * (size - seen) / max(seen, 1)
                print(
                    f"validate: {count:,} conversations, {seen / max(size, 1):.0%} of the file, "
                    f"{count / (told - began):,.0f} per second, {left / 60:.1f} min left; "
                    f"{len(faults):,} faults so far", file=sys.stderr, flush=True,
                )  # fmt: skip
    if not count:
        faults.append(Fault(1, "empty file", "there are no conversations in it"))
    return count, faults


class _Part(NamedTuple):
    """What was found in some lines."""

    conversations: int
    nbytes: int
    faults: list[Fault]


_Numbered = list[tuple[int, bytes]]


def _parts(file: BinaryIO) -> Iterator[_Numbered]:
    numbered = enumerate(file, 1)
    while part := list(itertools.islice(numbered, _LINES_AT_A_TIME)):
        yield part


def _check(checker: Checker, lines: _Numbered) -> _Part:
    real = [(number, line) for number, line in lines if line.strip()]
    faults = [fault for number, line in real for fault in checker.faults(number, line)]
    return _Part(len(real), sum(len(line) for _, line in lines), faults)


def _checked(parts: Iterator[_Numbered], checker: Checker, processes: int) -> Iterator[_Part]:
    """The parts' results in order; several processes are never far ahead of the reader."""
    if processes == 1:
        yield from (_check(checker, part) for part in parts)
        return
    context = multiprocessing.get_context("spawn")  # threads of a tokenizer do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_keep_checker, initargs=(checker,)
    ) as pool:
        waiting: collections.deque[concurrent.futures.Future[_Part]] = collections.deque()
        for part in parts:
            waiting.append(pool.submit(_check_kept, part))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _keep_checker(checker: Checker) -> None:
    global _kept
    _kept = checker


def _check_kept(lines: _Numbered) -> _Part:
    return _check(_kept, lines)


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
            templates.get_template(arguments.template, arguments.system),
            text.load_text_tokenizer(arguments.text_tokenizer),
            folder,
            vectors=arguments.vectors,
            max_length=arguments.max_length,
            decode=arguments.decode_images,
        )
        processes = arguments.processes
        if processes < 1:
            large = path.stat().st_size > _LARGE
            processes = (os.cpu_count() or 1) if large else 1
        count, faults = check_file(path, checker, processes)
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
    add("--system", help="what conversations begin with, if not as the template says")
    add("--text_tokenizer", default="bytes", help="bytes, or a folder of a Hugging Face model")
    add("--vectors", type=int, default=729, help="vectors of an image (27 x 27)")
    add("--max_length", type=int, default=2048, help="tokens, vectors included")
    add("--show", type=int, default=100, help="faults to print; 0 all")
    add("--processes", type=int, default=0, help="that share the work; 0 one per core, if large")
    add(
        "--decode_images", action=argparse.BooleanOptionalAction, default=True,
        help="decode every picture, not only look whether its file is there",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
