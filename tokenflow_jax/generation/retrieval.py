"""Caption retrieval: which real pictures are nearest to the one drawn for a caption?"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.generation.api import Generator, Recipe
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.model import TokenFlow

TOP = 10
_LARGEST_BANK = 5_000


def caption_retrieval(
    drawn: Generator,
    recipe: Recipe,
    examples: captions.Examples,
    *,
    count: int,
    batch_size: int,
    between_batches: Callable[[], None] = lambda: None,
    judges: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {},
) -> dict[str, float]:
    """Measure how often a caption's own picture is among the ten nearest to the one drawn for it.

    Pictures are compared by the tokenizer's semantic encoder: the mean of its patch features, less
    the mean over all pictures, by cosine. The real pictures are the tokenizer's reconstructions, so
    that its losses do not tell them from drawn ones. Other `judges` turn codes (N, L) into features
    (N, D) of their pictures.

    Returns:
      "top1" and "top10", rates; "chance", of the ten, for guessing; "rank", the median place, from
      1; and "top10_NAME", for example, of other judges.
    """
    bank_codes, bank_captions = _bank(drawn.tokenizer, examples, batch_size)
    # Captions to draw, evenly spaced like the bank.
    chosen = np.unique(np.arange(count) * len(bank_captions) // count)
    texts = [bank_captions[i] for i in chosen]
    parts = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        parts.append(drawn.codes(some, [0] * len(some), recipe, batch_size))
        between_batches()
    codes = np.concatenate(parts)
    found = {"chance": min(1.0, TOP / len(bank_captions))}
    for name, features in {"": make_feature_fn(drawn, batch_size), **judges}.items():
        rank_Q = _ranks(features(codes), features(bank_codes), chosen)
        end = f"_{name}" if name else ""
        found[f"top1{end}"] = float(np.mean(rank_Q == 1))
        found[f"top10{end}"] = float(np.mean(rank_Q <= TOP))
        found[f"rank{end}"] = float(np.median(rank_Q))
    return found


def _ranks(queries_QD: np.ndarray, bank_ND: np.ndarray, own_Q: np.ndarray) -> np.ndarray:
    """Return the place of each query's own picture among those of the bank, from 1."""
    similarity_QN = similarities(queries_QD, bank_ND)
    own_Q = similarity_QN[np.arange(len(own_Q)), own_Q]
    return (similarity_QN > own_Q[:, None]).sum(axis=1) + 1


def similarities(queries_QD: np.ndarray, bank_ND: np.ndarray) -> np.ndarray:
    """Return cosines (Q, N) of features less the mean of the bank's."""
    center_D = bank_ND.mean(axis=0)
    return _unit(queries_QD - center_D) @ _unit(bank_ND - center_D).T


def _bank(
    tokenizer: Tokenizer, examples: captions.Examples, batch_size: int
) -> tuple[np.ndarray, list[str]]:
    """Return the codes and captions of the usable examples."""
    total = min(len(examples), _LARGEST_BANK)
    arrays, texts = [], []
    for index in (np.arange(total) * len(examples) // total).tolist():
        example = examples[index]
        (text,) = captions.captions_of(examples, [index])
        if example is not None and text:
            arrays.append(example[examples.array])
            texts.append(text)
    if not texts:
        raise ValueError(f"no usable pair among the {len(examples)} of {examples.name}")
    if examples.array == "image":
        batches = range(0, len(arrays), batch_size)
        encoded = [tokenizer.encode(np.stack(arrays[i : i + batch_size])) for i in batches]
        return np.concatenate([np.asarray(codes) for codes in encoded]), texts
    return np.stack(arrays), texts


def make_feature_fn(drawn: Generator, batch_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from codes (N, L) to features (N, D) of their pictures."""
    tokenizer = drawn.tokenizer
    model = TokenFlow(tokenizer.config)

    @jax.jit
    def encode(params: Mapping, images_BHWC: jax.Array) -> jax.Array:
        images_BHWC = to_float(images_BHWC)
        tokens_BND = model.apply({"params": params}, images_BHWC, method="semantic_tokens")
        return tokens_BND.mean(axis=1)

    def features(codes_NL: np.ndarray) -> np.ndarray:
        rows = []
        for start in range(0, len(codes_NL), batch_size):
            images = drawn.decode(codes_NL[start : start + batch_size])
            missing = batch_size - len(images)
            padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
            rows.append(np.asarray(encode(tokenizer.params, padded))[: len(images)])
        return np.concatenate(rows)

    return features


def _unit(features_ND: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.maximum(norm_N1, 1e-12)
