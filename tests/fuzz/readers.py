"""What is fuzzed: for each reader small valid files, their kinds, and how they are read."""

import dataclasses
import pathlib
from collections.abc import Callable

Files = dict[str, bytes]
NAMES = (
    "safetensors", "torch", "jit", "pickle", "gguf", "shards", "config", "checkpoint", "fid",
    "pretrained", "teacher", "lpips", "dataset", "record", "captions", "tars", "parquet", "arrow",
    "conversations", "picture", "questions", "answers", "metrics", "prompts", "cifar10",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader of files.

    `seeds` makes valid files by relative path in an empty folder; `read` reads such a folder, all
    that is in it; `kinds` tell the structure of files by their endings (see `mutate.KINDS`).
    """

    seeds: Callable[[pathlib.Path], list[Files]]
    read: Callable[[pathlib.Path], None]
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)


def collect(folder: pathlib.Path) -> Files:
    """Return the content of all files below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def all_readers() -> dict[str, Reader]:
    from tests.fuzz import data_readers, weight_readers

    known = {**weight_readers.READERS, **data_readers.READERS}
    return {name: known[name] for name in NAMES}
