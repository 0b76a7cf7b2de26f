"""Models that come with the package, loaded by name: `Tokenizer.load("emoji")`."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parent / "assets" / "models"


def names() -> list[str]:
    """Return the names of the models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def resolved(path: str | os.PathLike) -> str:
    """Return a path; of a name that only a shipped model has, that model's folder."""
    path = os.fspath(path)
    if path in names() and not os.path.exists(path):
        return os.fspath(FOLDER / path)
    return path
