"""Measure what the shipped model draws and answers: the figures of docs/shipped.md.

    python -m tools.shipped.figures --checkpoint=emoji

Minutes on two cores. The nearest picture is judged by the tokenizer's semantic encoder among
reconstructions, as `generation.retrieval` does.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.matrix import table
from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.captions.texts import main_caption, words_of
from tokenflow_jax.data.chat.emoji import KIND_QUESTION, KINDS
from tokenflow_jax.data.examples import evenly_spaced
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.data.sources import open_source
from tokenflow_jax.generation import retrieval
from tokenflow_jax.unified.api import Unified

_BATCH = 32


def main() -> None:
    """Print the figures of a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="emoji")
    parser.add_argument("--top_p", type=float, help="of each pass; default: the checkpoint's")
    parser.add_argument("--count", type=int, default=158, help="captions and pictures at most")
    options = parser.parse_args()
    model = Unified.load(options.checkpoint)
    recipe = model.recipe
    if options.top_p is not None:
        passes = tuple((top_k, options.top_p) for top_k, _ in recipe.passes)
        recipe = dataclasses.replace(recipe, passes=passes)
    found = figures(dataclasses.replace(model, recipe=recipe), options.count)
    print(table(["figure", "%"], [[name, f"{100 * x:.1f}"] for name, x in found.items()]))


def figures(model: Unified, count: int) -> dict[str, float]:
    """Return the rates, by what they are of."""
    trained, unseen = (_examples(model, split) for split in ("train", "heldout"))
    found = {}
    for name, examples in {"trained": trained, "unseen": unseen}.items():
        how = {"count": count, "batch_size": _BATCH}
        rates = retrieval.caption_retrieval(model.generator, model.recipe, examples, **how)
        found |= {f"{name} captions, {top}": rates[top] for top in ("top1", "top10", "chance")}
    found["single words, nearest has it"] = words_drawn(model, trained, count)
    files = open_source("emoji", "", "heldout")
    shown = [files[i] for i in evenly_spaced(len(files), count)]
    found["kinds"] = kinds(model, shown)
    found["kinds of what it drew"] = kinds_of_drawn(model, shown)
    return found


def words_drawn(model: Unified, examples: Pictures, count: int) -> float:
    """Return how often the picture nearest to one drawn from a word has that word.

    The words are of evenly spaced pictures, one each of its caption and tags.
    """
    every = [examples[i] for i in range(len(examples))]
    known = [words_of(example) for example in every]
    rng = np.random.default_rng(0)
    asked = [str(rng.choice(known[i])) for i in evenly_spaced(len(every), count)]
    images = np.stack([example["image"] for example in every])
    nearest = _nearest(model, _draw(model, asked), model.tokenizer.encode(images))
    return float(np.mean([word in known[i] for word, i in zip(asked, nearest, strict=True)]))


def kinds(model: Unified, examples: Sequence[Mapping]) -> float:
    """Return how often the model names the kind of a picture, given as a file's bytes."""
    said = []
    for start in range(0, len(examples), _BATCH):
        images = [example["bytes"] for example in examples[start : start + _BATCH]]
        said += model.answer([KIND_QUESTION] * len(images), images)
    return float(np.mean([a == _kind(e) for a, e in zip(said, examples, strict=True)]))


def kinds_of_drawn(model: Unified, examples: Sequence[Mapping]) -> float:
    """Return how often the model names the kind of what it drew from a picture's caption."""
    right = []
    for example in examples:
        chat = model.chat()
        chat.draw(main_caption(example))
        right.append(chat.ask(KIND_QUESTION) == _kind(example))
    return float(np.mean(right))


def _examples(model: Unified, split: str) -> Pictures:
    size = model.tokenizer.config.image_size
    return Pictures(DataConfig("emoji", "", split, size, "center", flip=False))


def _kind(example: Mapping) -> str:
    return KINDS[int(example["group"])]


def _draw(model: Unified, texts: Sequence[str]) -> np.ndarray:
    parts = []
    for start in range(0, len(texts), _BATCH):
        some = texts[start : start + _BATCH]
        parts.append(model.generator.codes(some, [0] * len(some), model.recipe, _BATCH))
    return np.concatenate(parts)


def _nearest(model: Unified, codes_QN: np.ndarray, bank_IN: np.ndarray) -> np.ndarray:
    """Return the index of the picture in a bank that is nearest to each one."""
    features = retrieval.make_feature_fn(model.generator, _BATCH)
    return retrieval.similarities(features(codes_QN), features(bank_IN)).argmax(axis=1)


if __name__ == "__main__":
    main()
