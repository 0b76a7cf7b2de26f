"""Tries inputs one after the other, in a process of its own, and tells what became of each."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator

from tests.fuzz.mutate import mutate
from tests.fuzz.readers import Files, Reader, all_readers
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.messages import printable

MOST_SECONDS = 10.0
_MOST_BYTES = 2**30  # that a reader may take beyond what it had
_LONGEST_TEXT = 2000
FAILURES = pathlib.Path(tempfile.gettempdir(), "tokenflow-fuzz")


@dataclasses.dataclass(frozen=True)
class Job:
    reader: str
    seed: int
    first: int
    inputs: int

    def kept(self, index: int) -> pathlib.Path:
        """Return the folder of a failing input."""
        return FAILURES / f"{self.reader}-{self.seed}-{index}"


def make_input(name: str, reader: Reader, seeds: list[Files], seed: int, index: int) -> Files:
    """Return the files of an input; the same for the same arguments."""
    rng = random.Random(f"{name} {seed} {index}")
    return mutate(rng.choice(seeds), reader.kinds, rng)


def write(files: Files, folder: pathlib.Path) -> None:
    """Replace a folder by these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class _Opened:
    """The files outside a folder that Python code has opened."""

    def __init__(self):
        own = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), os.getcwd())
        self._fine = (*own, "/proc/", "/sys/", "/etc/", "/usr/", "/dev/null", "/dev/shm/")
        self._folder: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event != "open" or self._folder is None or isinstance(arguments[0], int | None):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith((self._folder, *self._fine)):
            self.outside.append(path)

    @contextlib.contextmanager
    def watched(self, folder: pathlib.Path) -> Iterator[None]:
        self.outside.clear()
        self._folder = str(folder)
        try:
            yield
        finally:
            self._folder = None


def _judge(error: BaseException, files: Files, folder: pathlib.Path) -> str:
    """Return what is wrong with an error; "" if it is a clean one."""
    text = str(error)
    named = isinstance(error, Broken) or str(folder) in text
    named = named or any(os.path.basename(name) in text for name in files)
    if not isinstance(error, ValueError | OSError):
        problem = "another type of error"
    elif len(text) > _LONGEST_TEXT:
        problem = f"{len(text):,} characters"
    elif printable(text) != text:
        problem = "control characters"
    elif not named:
        problem = "names no file"
    else:
        return ""
    where = "".join(traceback.format_exception(error)[-6:])
    return f"{problem}: {type(error).__name__}: {text[:300]!a}\n{ascii_lines(where[-1500:])}"


def ascii_lines(text: str) -> str:
    return "\n".join(ascii(line)[1:-1] for line in text.splitlines())


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limit_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * _MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def work(jobs: list[Job], home: str) -> None:
    """Print a line of JSON for every input: outcome ("right", "clean", "wrong") and reason.

    The input that is read lies in `home`/case.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no result
    logging.disable()
    warnings.simplefilter("ignore")
    opened, readers = _Opened(), all_readers()
    pathlib.Path(home, "outside.png").write_bytes(b"\x89PNG")
    for number, job in enumerate(jobs):
        reader, folder = readers[job.reader], pathlib.Path(home, "case")
        write({}, folder)
        seeds = reader.seeds(folder)
        for seed in seeds:
            write(seed, folder)
            with opened.watched(folder):
                reader.read(folder)
            assert not opened.outside, opened.outside
        print(json.dumps({"ready": number}), file=out, flush=True)
        _limit_memory()
        for index in range(job.first, job.first + job.inputs):
            files = make_input(job.reader, reader, seeds, job.seed, index)
            write(files, folder)
            before, start, outcome, why = _peak(), time.monotonic(), "right", ""
            try:
                with opened.watched(folder):
                    reader.read(folder)
            except BaseException as error:
                why = _judge(error, {**files, **seeds[0]}, folder)
                outcome = "wrong" if why else "clean"
            seconds = time.monotonic() - start
            if opened.outside:
                why += f"\nopens {opened.outside[:3]!a}"
            if seconds > MOST_SECONDS:
                why += f"\ntakes {seconds:.1f} s"
            if _peak() - before > _MOST_BYTES:
                why += f"\ntakes {(_peak() - before) / 2**30:.1f} GiB"
            if why:
                keep(job, index, folder)
            result = {"job": number, "index": index, "outcome": "wrong" if why else outcome}
            print(json.dumps(result | {"why": why, "seconds": seconds}), file=out, flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def keep(job: Job, index: int, folder: pathlib.Path) -> None:
    """Copy a failing input to where a person can look at it."""
    kept = job.kept(index)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
