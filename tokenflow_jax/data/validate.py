r"""Check a file of conversations before training on it.

    python -m tokenflow_jax.data.validate chat.jsonl --image_folder=pictures \
        --template=qwen_2_5 --text_tokenizer=Qwen2.5-14B-Instruct --max_length=2048

prints one line per fault, with its line number, and a summary. Training skips a conversation with a
fault that is not "used anyway". Exit codes: 0 no fault, 1 faults, 2 wrong arguments.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import flags

from tokenflow_jax import cli, log, remote
from tokenflow_jax.data import images, jsonl, text
from tokenflow_jax.data.chat import conversations, insertion, templates
from tokenflow_jax.data.chat.templates import IMAGE, Template
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.messages import one_line, printable, shown

_LINES_AT_A_TIME = 512
_LARGE = 20 * 10**6  # bytes of a file that several processes are worth starting for
_TELL_EVERY = 10.0  # seconds
_kept: Any = None  # the checker of this process


class Fault(NamedTuple):
    """A defect of a line."""

    line: int  # from 1
    reason: str  # a short category
    detail: str
    skipped: bool = True  # training leaves the conversation out; else it is used, but changed

    def __str__(self) -> str:
        verdict = "" if self.skipped else " (used anyway)"
        return f"line {self.line}: {self.reason}: {one_line(self.detail)}{verdict}"


@dataclasses.dataclass(eq=False)
class Checker:
    """A finder of all faults of a conversation at once, for one kind of training."""

    template: Template
    text_tokenizer: Any
    folder: str | os.PathLike  # that paths of images are relative to
    vectors: int  # per image
    max_length: int  # of a conversation, vectors included
    decode: bool  # every picture; else it is enough that the file is there
    allow_outside: bool = False  # of the folder
    drawn: insertion.Drawn | None = None  # what a picture in an answer becomes, if models draw

    def faults(self, number: int, line: bytes) -> Iterator[Fault]:
        """Yield the faults of one line."""
        try:
            sample = conversations.parse_line(line)
            if sample.image and (broken := self._image_fault(sample.image)) is not None:
                yield Fault(number, broken.reason, broken.detail)
            row = conversations.prepare(
                sample, self.template, self.text_tokenizer, self.vectors, self.max_length,
                self.drawn,
            )  # fmt: skip
        except Broken as error:
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
        turns = templates.prepare_turns(sample.turns, bool(sample.image), self.drawn is not None)
        ids_L = self.template.tokenize(self.text_tokenizer, turns).ids_L
        length = len(insertion.merge_row(ids_L, None, self.vectors, drawn=self.drawn)["ids"])
        if length > self.max_length:
            detail = f"{length} tokens, cut to {self.max_length}"
            question_T = self.template.prompt_ids(self.text_tokenizer, turns[:1])
            if insertion.merged_length(question_T, self.vectors) >= self.max_length:
                detail += ", before the first answer starts"
            yield Fault(number, "over length", detail, False)

    @functools.cache  # noqa: B019 - each picture is decoded once; a checker lives to the end
    def _image_fault(self, image: str) -> Broken | None:
        where = (image, self.folder, self.allow_outside)
        try:
            if self.decode:
                conversations.load_image(conversations.read_image(*where), 8, "square")
            elif remote.kind_of(images.locate(*where)) != "file":
                raise Broken("missing image", "there is no such file")
        except Broken as error:
            name = "" if shown(image) in error.detail else f"{shown(image)}: "
            return Broken(error.reason, name + error.detail)
        return None


def check_file(path: pathlib.Path, checker: Checker, processes: int = 1) -> tuple[int, list[Fault]]:
    """Return the number of conversations of a file and its faults, in the order of the lines."""
    count, faults, size = 0, [], path.stat().st_size
    start = last = time.monotonic()
    with path.open("rb") as file:
        for checked, found in _checked(_parts(file), checker, processes):
            count += checked
            faults += found
            if (now := time.monotonic()) - last > _TELL_EVERY:
                last, seen = now, file.tell()  # a little ahead of what was checked
                left = (now - start) * (size - seen) / max(seen, 1)
                # Not `log.Progress`, which writes to stdout, among the faults.
                print(
                    f"validate: {count:,} conversations, {seen / max(size, 1):.0%} of the file, "
                    f"{count / (now - start):,.0f} per second, eta {log.duration(left)}; "
                    f"{len(faults):,} faults so far", file=sys.stderr, flush=True,
                )  # fmt: skip
    if not count:
        faults.append(Fault(1, "empty file", "there are no conversations in it"))
    return count, faults


_Numbered = list[tuple[int, bytes]]
_Result = tuple[int, list[Fault]]  # conversations, and their faults


def _parts(file: BinaryIO) -> Iterator[_Numbered]:
    numbered = ((number, line) for number, _, line in jsonl.lines_of(file))
    while part := list(itertools.islice(numbered, _LINES_AT_A_TIME)):
        yield part


def _check(lines: _Numbered) -> _Result:
    return len(lines), [fault for number, line in lines for fault in _kept.faults(number, line)]


def _checked(parts: Iterator[_Numbered], checker: Checker, processes: int) -> Iterator[_Result]:
    """Yield the parts' results in order; several processes are never far ahead of the reader."""
    if processes == 1:
        _keep_checker(checker)
        yield from map(_check, parts)
        return
    context = multiprocessing.get_context("spawn")  # threads of a tokenizer do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_keep_checker, initargs=(checker,)
    ) as pool:
        while some := list(itertools.islice(parts, 16 * processes)):
            yield from pool.map(_check, some)


def _keep_checker(checker: Checker) -> None:
    global _kept
    _kept = checker


def main(options: flags.FlagValues) -> int:
    """Print the faults of a file and return the exit code."""
    cli.require(options, "file")
    if remote.kind_of(options.file) != "file":
        raise ValueError(f"{options.file} is not a file")
    path = pathlib.Path(remote.local_copy(options.file))
    folder = options.image_folder or os.path.dirname(options.file) or "."
    if remote.kind_of(folder) != "folder":
        raise ValueError(f"--image_folder {folder} is not a folder")
    text_tokenizer = text.load_text_tokenizer(options.text_tokenizer)
    marks = [text_tokenizer.encode(m, add_special_tokens=False) for m in (text.OPEN, text.CLOSE)]
    checker = Checker(
        templates.get_template(options.template, options.system),
        text_tokenizer,
        folder,
        options.vectors,
        options.max_length,
        options.decode_images,
        options.allow_outside,
        insertion.Drawn(options.codes, *marks) if options.codes else None,
    )
    if (processes := options.processes) < 1:
        processes = (os.cpu_count() or 1) if path.stat().st_size > _LARGE else 1
    count, faults = check_file(path, checker, processes)
    for fault in faults[: options.show or None]:
        print(printable(str(fault)))
    if options.show and len(faults) > options.show:
        print(f"... and {len(faults) - options.show} more (--show=0 prints all)")
    kinds = collections.Counter(fault.reason for fault in faults)
    bad = len({fault.line for fault in faults if fault.skipped})
    summary = ", ".join(f"{n} {reason}" for reason, n in kinds.most_common()) or "no faults"
    print(
        f"{options.file}: {count} conversations, {bad} of them are skipped in training ({summary})"
    )
    return 1 if faults else 0


def define_flags(define: cli.Define) -> None:
    define.string("file", None, "The .jsonl file; its name alone will do.")
    define.string("image_folder", "", "Folder of the images; the file's by default.")
    define.string("template", "qwen_2_5", f"One of {', '.join(templates.TEMPLATES)}.")
    define.string("system", None, "Replaces the template's system prompt.")
    define.string("text_tokenizer", "bytes", "bytes, or a folder of a Hugging Face model.")
    define.integer("vectors", 729, "Vectors per image (27 x 27).")
    define.integer("codes", 0, "Of a picture in an answer, for models that draw; 0: none draws.", 0)
    define.integer("max_length", 2048, "Tokens of a conversation, vectors included.")
    define.integer("show", 100, "Faults to print; 0: all.")
    define.integer("processes", 0, "0: one per core for a large file.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    define.bool("decode_images", True, "Decode every picture instead of only finding its file.")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return cli.run("validate", main, define_flags, argv, positional="file", runtime=False)


if __name__ == "__main__":
    sys.exit(run())
