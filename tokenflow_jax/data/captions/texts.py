"""The texts of a picture as captions: a caption or a list of them, tags, a group.

Templates say which captions can be made of them; one is drawn for each place in the stream, so the
same picture comes with different words in every epoch:

    "{caption}"            red apple
    "{caption}, {tags}"    red apple, fruit, food       up to two tags, drawn
    "{tags}"               fruit, red
    "{words}"              food apple                   up to five words of captions and tags, drawn
    "{group}: {caption}"   food drink: red apple
"""

import dataclasses
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokenflow_jax.data import sources
from tokenflow_jax.data.examples import Broken

FIELDS = ("caption", "tags", "words", "group")
_TAGS, _WORDS = 2, 5  # at most, in one caption


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """The way texts become captions."""

    templates: tuple[str, ...] = ("{caption}",)  # one that is listed twice is drawn twice as often
    # Probability that a caption is left out, which trains the unconditional branch that classifier-
    # free guidance needs (the reference sets such a rate and never uses it).
    drop_rate: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "templates", tuple(self.templates))
        problems = [] if self.templates else ["there is no template"]
        for template in self.templates:
            fields = _fields(template)
            if not fields or not fields <= set(FIELDS):
                problems.append(f"template {template!r} must name some of {FIELDS} in braces")
        if not 0 <= self.drop_rate <= 1:
            problems.append(f"drop_rate {self.drop_rate} is not a probability")
        if problems:
            raise ValueError("captions: " + "; ".join(problems))


def _fields(template: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError:  # not a template
        return {""}


def main_caption(example: Mapping[str, Any]) -> str:
    """Return the caption for evaluation: the first one, or else the tags, or ""."""
    return example.get("caption") or ", ".join(example.get("tags", ()))


def usable_templates(example: Mapping[str, Any], config: CaptionConfig) -> list[str]:
    """Return the templates of which an example has all fields, or raise Broken."""
    known: dict[str, Callable[[], bool]] = {
        "caption": lambda: bool(_captions(example)),
        "tags": lambda: bool(example.get("tags")),
        "words": lambda: bool(words_of(example)),
        "group": lambda: example.get("group", -1) >= 0,
    }
    usable = [t for t in config.templates if all(known[field]() for field in _fields(t))]
    if not usable:
        raise Broken("no caption", f"{example.get('name', '')} for {config.templates}")
    return usable


def _captions(example: Mapping[str, Any]) -> list[str]:
    return example.get("captions") or ([example["caption"]] if example.get("caption") else [])


def words_of(example: Mapping[str, Any]) -> list[str]:
    """Return the different words of captions and tags, without punctuation around them."""
    parts = " ".join([*_captions(example), *(example.get("tags") or [])]).split()
    return list(dict.fromkeys(filter(None, map(_without_punctuation, parts))))


def _without_punctuation(word: str) -> str:
    """Return a word from its first to its last character that is no punctuation."""
    kept = [i for i, one in enumerate(word) if not unicodedata.category(one).startswith("P")]
    return word[kept[0] : kept[-1] + 1] if kept else ""


def draw_caption(
    example: Mapping[str, Any], config: CaptionConfig, rng: np.random.Generator
) -> str:
    """Return a caption drawn from those an example allows, "" where dropped, or Broken."""
    usable = usable_templates(example, config)
    captions, tags, group = _captions(example), example.get("tags"), example.get("group", -1)
    if rng.random() < config.drop_rate:
        return ""
    texts = {}
    if captions:
        texts["caption"] = captions[rng.integers(len(captions))]
    if tags:
        drawn = rng.permutation(len(tags))[: rng.integers(1, _TAGS + 1)]
        texts["tags"] = ", ".join(tags[i] for i in drawn)
    if group >= 0:
        names = sources.GROUPS
        texts["group"] = names[group].replace("-", " ") if group < len(names) else str(group)
    template = usable[rng.integers(len(usable))]
    if "words" in _fields(template):
        words = words_of(example)
        count = rng.integers(1, min(_WORDS, len(words)) + 1)
        texts["words"] = " ".join(words[i] for i in rng.permutation(len(words))[:count])
    return template.format(**texts)
