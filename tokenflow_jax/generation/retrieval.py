"""Whether drawn pictures show what their captions say: which real pictures are they nearest to?"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.generation.api import Generator, Recipe
from tokenflow_jax.nets.encoders import encoder_kind, normalize
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
) -> dict[str, float]:
    """How often a caption's own picture is among the ten nearest to the one drawn for it.

    Pictures are compared by what the tokenizer's semantic encoder sees in them: the mean of its
    patch features, less the mean over all pictures, by cosine. The real pictures are the
    tokenizer's reconstructions, so that what it loses does not tell them from drawn ones.

    Args:
      drawn: draws.
      recipe: how.
      examples: captioned codes or pictures; at most 5,000 of them, evenly spaced, are compared.
      count: how many captions are drawn, evenly spaced.
      batch_size: pictures at a time.

    Returns:
      "top10", a rate; "chance", what guessing gives; "rank", the median place, from 1.

    Raises:
      ValueError: none of the examples is usable.
    """
    bank_codes, bank_captions = _bank(drawn.tokenizer, examples, batch_size)
    chosen = np.unique(np.arange(count) * len(bank_captions) // count)
    texts = [bank_captions[i] for i in chosen]
    codes = drawn.codes(texts, [0] * len(texts), recipe, batch_size)
    see = _eyes(drawn, batch_size)
    bank_ND, queries_QD = see(bank_codes), see(codes)
    centre_D = bank_ND.mean(axis=0)
    similarity_QN = _unit(queries_QD - centre_D) @ _unit(bank_ND - centre_D).T
    own_Q = similarity_QN[np.arange(len(chosen)), chosen]
    rank_Q = (similarity_QN > own_Q[:, None]).sum(axis=1) + 1
    return {
        "top10": float(np.mean(rank_Q <= TOP)),
        "chance": min(1.0, TOP / len(bank_captions)),
        "rank": float(np.median(rank_Q)),
    }


def _bank(
    tokenizer: Tokenizer, examples: captions.Examples, batch_size: int
) -> tuple[np.ndarray, list[str]]:
    """Codes and captions of the usable examples."""
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


def _eyes(drawn: Generator, batch_size: int):
    """A function from codes (N, L) to features (N, D) of their pictures."""
    tokenizer = drawn.tokenizer
    model, kind = TokenFlow(tokenizer.config), encoder_kind(tokenizer.config.semantic_encoder)

    @jax.jit
    def features(params: Mapping, images_BHWC: jax.Array) -> jax.Array:
        images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
        if not kind.raw:
            images_BHWC = normalize(images_BHWC, kind.mean, kind.std)
        tokens_BND = model.apply(
            {"params": params}, images_BHWC, method=lambda model, x: model.semantic_encoder(x)
        )
        return tokens_BND.mean(axis=1)

    def see(codes_NL: np.ndarray) -> np.ndarray:
        rows = []
        for start in range(0, len(codes_NL), batch_size):
            images = drawn.decode(codes_NL[start : start + batch_size])
            missing = batch_size - len(images)
            filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
            rows.append(np.asarray(features(tokenizer.params, filled))[: len(images)])
        return np.concatenate(rows)

    return see


def _unit(features_ND: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.maximum(norm_N1, 1e-12)
