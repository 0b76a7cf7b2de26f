"""Pictures of any source as ArrayRecord parts: checked, shrunk, encoded again, by many processes.

What is left out is noted beside each part; the notes become `skipped.jsonl` when all parts of all
hosts are complete.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from tokenflow_jax import files
from tokenflow_jax.data import images, parts, records, sources
from tokenflow_jax.data.examples import MIN_TO_SPLIT, Broken, evenly_spaced
from tokenflow_jax.log import Progress, log
from tokenflow_jax.messages import one_line, plain

FORMATS = {"keep": "", "webp": "WEBP", "jpeg": "JPEG"}
SKIPPED = "skipped.jsonl"
_SAMPLE = 64  # pictures that tell how large all are
_AHEAD = 256  # pictures that a source is told about
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_FEW = 2000  # pictures that one process packs before others would have started


@dataclasses.dataclass(frozen=True)
class Packing:
    """A source of pictures, and what becomes of them."""

    kind: str  # a key of `sources.open_source`
    path: str
    image_folder: str = ""
    allow_outside: bool = False
    image_column: str = ""
    longest_side: int = 0  # pixels; larger pictures are shrunk to it; 0: none are
    format: str = "keep"  # or a key of FORMATS that all are encoded to
    quality: int = 90  # of JPEG and WebP, where pictures are encoded

    def __post_init__(self):
        problems = []
        if self.format not in FORMATS:
            problems.append(f"format {self.format!r} is not one of {tuple(FORMATS)}")
        if not 1 <= self.quality <= 100:
            problems.append(f"quality {self.quality} is not within 1 and 100")
        if self.longest_side and self.longest_side < images.MIN_SIDE:
            problems.append(f"longest_side {self.longest_side} is below {images.MIN_SIDE}")
        if problems:
            raise ValueError("; ".join(problems))

    def open(self, split: str) -> Any:
        where = self.image_folder, self.allow_outside, self.image_column
        source = sources.open_source(self.kind, self.path, split, *where)
        if hasattr(source, "read_in_order"):
            source.read_in_order()
        return source

    def splits(self) -> dict[str, Any]:
        """Return the splits as the source defines them; only "train" where nothing is held out."""
        everything = self.open("all")
        if names := getattr(everything, "splits", ()):
            return {split: self.open(split) for split in names}
        if len(everything) < MIN_TO_SPLIT:
            return {"train": self.open("train")}
        return {split: self.open(split) for split in ("train", "heldout")}

    def pack(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an example with the picture as it is written, or raise Broken."""
        image_HWC = images.decode(example["bytes"])
        small_HWC = image_HWC
        if self.longest_side:
            small_HWC = images.fit_within(image_HWC, self.longest_side)
            images.check_size(small_HWC.shape[1], small_HWC.shape[0])
        if self.format == "keep" and small_HWC is image_HWC:
            return example
        kind = FORMATS[self.format] or images.kind_of(example["bytes"])
        return {**example, "bytes": images.encode(small_HWC, kind, self.quality)}

    def bytes_per_picture(self, splits: Mapping[str, Any]) -> float:
        """Return the mean size of some records, evenly spaced."""
        sizes = []
        for source in splits.values():
            for index in evenly_spaced(len(source), _SAMPLE):
                with contextlib.suppress(Broken):
                    sizes.append(len(records.pack(self.pack(source[int(index)]))))
        return float(np.mean(sizes)) if sizes else 1.0


class PartWriter(parts.PartWriter):
    """A writer of parts with pictures; see `parts`."""

    plan_name = "preparing.json"
    taken = f"already holds another data set ({records.MANIFEST})"
    remedy = "choose another folder or pass --overwrite"

    def _publish(self, splits: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        notes = [_notes_of(file) for _, _, file in self._parts()]
        reasons: collections.Counter[str] = collections.Counter()
        first = ""
        try:
            with records.write_at_once(self.folder / SKIPPED) as partial, partial.open("wb") as out:
                for line in (line for path in notes for line in path.open("rb")):
                    out.write(line)
                    note = json.loads(line)
                    reasons[note["reason"]] += 1
                    first = first or f"{plain(note['name'])}: {note['reason']}"
        except FileNotFoundError:
            if (self.folder / records.MANIFEST).exists():  # done before, or by another host
                return
            raise
        skipped = dict(sorted(reasons.items()))
        if not splits:
            self._clear()
            raise ValueError(
                f"{about['path']} has no usable image among {sum(reasons.values())}: {skipped}, "
                f"for example {first}"
            )
        records.write_manifest(self.folder, splits, {**about, "skipped": skipped})
        for path in notes:
            path.unlink(missing_ok=True)

    def _clear(self) -> None:
        super()._clear()
        for path in (self.folder / SKIPPED, *self.folder.glob(".skipped-*")):
            path.unlink(missing_ok=True)


def _notes_of(file: epath.Path) -> epath.Path:
    return file.with_name(f".skipped-{file.name}.jsonl")


def _keep_memory() -> None:
    """Ask the allocator to keep what a picture took: half of the time went into its pages."""
    with contextlib.suppress(OSError, AttributeError):  # other systems than Linux
        allocator = ctypes.CDLL("libc.so.6").mallopt
        for option, size in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**28)):
            allocator(option, size)


def write_parts(
    writer: parts.PartWriter, packing: Packing, splits: Mapping[str, Any], workers: int = 0
) -> None:
    """Write the missing parts of this host with some processes, 0: one per core."""
    _keep_memory()
    todo = writer.mine()
    total = sum(len(places) for _, places, _ in todo)
    few = total < _FEW and not workers
    workers = 1 if few else min(workers or os.cpu_count() or 1, max(1, len(todo)))
    line = Progress(f"writing {writer.folder}", total)
    if workers == 1:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            line.update(done)

        for part in todo:
            _log_part(part[2], *_write(packing, splits[part[0]], part, tick))
        return
    context = multiprocessing.get_context("spawn")  # threads of readers do not survive a fork
    count, stop = context.Value("q", 0), context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(packing, count, stop)
    ) as pool:
        left = {pool.submit(_write_apart, part): part[2] for part in todo}
        try:
            while left:
                for future in concurrent.futures.wait(left, 1, "FIRST_COMPLETED").done:
                    _log_part(left.pop(future), *future.result())
                line.update(count.value)
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise OSError(
                    "a worker was killed, perhaps for want of memory; run the same again, which "
                    "continues, with fewer --workers"
                ) from error
            raise


def _log_part(file: epath.Path, count: int, skipped: dict[str, int], first: str) -> None:
    more = f", {sum(skipped.values())} skipped {skipped}, such as {first}" if skipped else ""
    log.info("%s: %d pictures%s", file.name, count, more)


_worker: Any = None  # of this process: packing, its sources, counter, event


def _start(packing: Packing, *shared: Any) -> None:
    global _worker
    _worker = packing, functools.lru_cache(packing.open), *shared
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells all to stop
    logging.disable()  # the first process has opened the same sources
    parent = multiprocessing.parent_process()

    def end() -> None:
        parent.join()  # killed, it would leave this one writing
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _write_apart(part: parts.Part) -> tuple[int, dict[str, int], str]:
    packing, open_split, count, stop = _worker

    def tick() -> None:
        with count.get_lock():
            count.value += 1
        if stop.is_set():
            raise OSError("stopped")

    return _write(packing, open_split(part[0]), part, tick)


def _write(
    packing: Packing, source: Any, part: parts.Part, tick: Callable[[], None]
) -> tuple[int, dict[str, int], str]:
    """Write a part; return the number of its pictures and what was skipped, with an example."""
    split, places, file = part
    reasons: collections.Counter[str] = collections.Counter()
    first = ""

    def examples() -> Iterator[Mapping[str, Any]]:
        nonlocal first
        with (
            files.write_atomically(_notes_of(file), overwrite=True) as partial,
            partial.open("w", encoding="utf-8", errors="backslashreplace") as notes,
        ):
            for index in places:
                if hasattr(source, "will_need") and not (index - places.start) % _AHEAD:
                    source.will_need(np.arange(index, min(index + _AHEAD, places.stop)))
                name = f"{split} {index}"
                try:
                    example = source[index]
                    name = example["name"]
                    example = packing.pack(example)
                except Broken as error:
                    note = {
                        "split": split,
                        "name": name,
                        "reason": error.reason,
                        "detail": one_line(error.detail),
                        "url": _url(source, index),
                    }
                    kept = {key: value for key, value in note.items() if value}
                    notes.write(json.dumps(kept, ensure_ascii=False) + "\n")
                    reasons[error.reason] += 1
                    first = first or f"{plain(name)}: {one_line(error)}"
                else:
                    yield example
                tick()

    # The notes are complete before the part is.
    return parts.write_part(file, examples()), dict(sorted(reasons.items())), first


def _url(source: Any, index: int) -> str:
    with contextlib.suppress(Broken):
        return source.url(index) if hasattr(source, "url") else ""
    return ""
