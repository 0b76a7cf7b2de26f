"""Folders of images as a source: classes and splits by sub-folder."""

import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Set
from typing import Any

from tokenflow_jax import remote
from tokenflow_jax.data import images
from tokenflow_jax.data.examples import (
    HELDOUT_NAMES,
    MIN_TO_SPLIT,
    SPLITS,
    Broken,
    is_heldout,
)  # fmt: skip
from tokenflow_jax.log import log
from tokenflow_jax.messages import plain, shown

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_USUAL_SPLITS = ("train", *HELDOUT_NAMES)
_SYNONYMS = {"training": "train", "valid": "val", "dev": "val"}


class FolderSource:
    """All images below a folder, sorted by path; the first sub-folder is the class.

    When pictures lie only in sub-folders named train, heldout, validation, val or test, or as
    "Train", "training", "valid", "dev" or "val2017", these are the splits, and pictures beside them
    are left out. Otherwise "train" and "heldout" are the parts of `is_heldout`; below 100 pictures
    both are everything, and the log says so. Validation, val and test mean heldout. Links that lead
    outside the folder are followed only with `allow_outside`.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "all", allow_outside: bool = False):
        root, self._allow_outside = os.fspath(folder), allow_outside
        if remote.kind_of(root) != "folder":
            raise ValueError(f"data.path {os.fspath(folder)!r} is not a folder of images")
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"a folder of images has no split {split!r}; one of {SPLITS}")
        names, outside = _image_names(root, allow_outside)
        if outside:
            log.warning(
                "%s: %d links to folders outside are left out, such as %s; pass allow_outside if "
                "they are intended", root, len(outside), plain(outside[0]),
            )  # fmt: skip
        if not names:
            raise ValueError(
                f"{root} holds no images: none of its files ends in {', '.join(IMAGE_ENDINGS)}"
                + (", and links to folders outside need allow_outside" if outside else "")
            )
        subfolders = {name.split("/")[0] for name in names if "/" in name}  # those with pictures
        are_splits = _are_splits(root, subfolders)
        self.splits = sorted({split_meant(name) or "" for name in subfolders if are_splits})
        divided = split != "all" and are_splits
        if split != "all" and not divided:
            _warn_of_deep_splits(root, names)
        # Of all splits: a class must have the same number in each.
        paths = [name.split("/")[divided:] for name in names]
        self.classes = sorted({path[0] for path in paths if len(path) > 1})
        self.numbers = ("label",) if self.classes else ()
        if divided:
            if beside := sum("/" not in name for name in names):
                log.warning(
                    "%s: %d pictures are left out, because they lie beside the splits %s",
                    root, beside, shown(sorted(subfolders)),
                )  # fmt: skip
            part = _split_folder(root, subfolders, split)
            names = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        elif split != "all" and len(names) >= MIN_TO_SPLIT:
            names = [name for name in names if is_heldout(name) == (split != "train")]
        elif split not in ("all", "train"):
            log.warning(
                "%s has %d pictures, fewer than %d: none are held out, so the figures of split %r "
                "are on training pictures", root, len(names), MIN_TO_SPLIT, split,
            )  # fmt: skip
        self._root, self._names, self._part = root, names, f"{part}/" if divided else ""

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        label = {"label": self.classes.index(name.split("/")[0])} if "/" in name else {}
        data = images.read_file(self._part + name, self._root, self._allow_outside)
        return {"name": name, **label, "bytes": data}


def split_meant(folder: str) -> str | None:
    """Return the split that a folder's name usually means: of "Train2017", "train"."""
    word = re.sub(r"(?<=[a-z])(19|20)[0-9]{2}$", "", folder.lower())
    word = _SYNONYMS.get(word, word)
    return word if word in _USUAL_SPLITS else None


def _seem_splits(named: Set[str]) -> bool:
    # Not "train" alone, which may well be a class of vehicles among other classes.
    several = len(named) > 1 and "train" in map(split_meant, named)
    return several or any(name.lower() not in _USUAL_SPLITS for name in named)


def _are_splits(root: str, subfolders: Set[str]) -> bool:
    named = {name for name in subfolders if split_meant(name)}
    if named != subfolders and _seem_splits(named):
        log.warning(
            "%s: %s are taken as classes, not as splits, because %s hold pictures too; if they are "
            "splits, move the others away",
            root, shown(sorted(named)), shown(sorted(subfolders - named)),
        )  # fmt: skip
    return bool(named) and named == subfolders


def _warn_of_deep_splits(root: str, names: Iterable[str]) -> None:
    inner = defaultdict(set)  # first folder -> folders in it that are named as splits
    for first, second in {tuple(n.split("/", 2)[:2]) for n in names if n.count("/") > 1}:
        if split_meant(second):
            inner[first].add(second)
    found = [f"{first}/{name}" for first in sorted(inner) for name in sorted(inner[first])
             if _seem_splits(inner[first])]  # fmt: skip
    if found:
        log.warning(
            "%s: %s are taken as parts of classes, not as splits; if they are splits, name the "
            "folder that they lie in as data.path", root, shown(found),
        )  # fmt: skip


def _split_folder(root: str, subfolders: Set[str], split: str) -> str:
    meant: dict[str, str] = {}
    for folder in sorted(subfolders):
        other = meant.setdefault(split_meant(folder) or "", folder)
        if other != folder:
            raise ValueError(
                f"{root}: {other!r} and {folder!r} both mean split {split_meant(folder)!r}; move "
                "one away, or name one as data.path"
            )
    for name in [split] if split == "train" else [split, *HELDOUT_NAMES]:
        if name in meant:
            return meant[name]
    raise ValueError(
        f"{root} is divided into {sorted(subfolders)}, none of which is split {split!r}; add that "
        "sub-folder, or name one of these as data.path"
    )


def _image_names(root: str, allow_outside: bool) -> tuple[list[str], list[str]]:
    """Return sorted relative paths of images, following links once each, and those left out."""
    if remote.is_remote(root):
        found = (name for name in remote.files_below(root) if name.lower().endswith(IMAGE_ENDINGS))
        return [name for name in found if not re.search(r"(^|/)\.", name)], []
    names, outside, seen = [], [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a second link to the same place
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            path = os.path.relpath(os.path.join(folder, name), root)
            try:
                images.locate(path, root, allow_outside)
            except Broken:
                subfolders.remove(name)
                outside.append(path)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_ENDINGS):
                names.append(pathlib.Path(folder, name).relative_to(root).as_posix())
    return sorted(names), outside
