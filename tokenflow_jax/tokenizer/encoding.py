"""A data set of pictures becomes codes: decoded by threads, encoded batch by batch."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.captions.codes import CodesInMemory
from tokenflow_jax.log import progress
from tokenflow_jax.parallel import hosts
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.frozen import image_codes
from tokenflow_jax.tokenizer.model import TokenFlow

_BATCHES_AHEAD = 2


def image_encoder(tokenizer: Tokenizer) -> Callable[[np.ndarray], jax.Array]:
    """A compiled function from uint8 (B, H, H, 3) to codes (B, L), over this process's devices.

    Args:
      tokenizer: in float32 its products have full precision, as in `Tokenizer.encode`.
    """
    model = TokenFlow(tokenizer.config, dtype=jnp.dtype(tokenizer.dtype))
    compiled = hosts.over_local_devices(functools.partial(image_codes, model))
    params = hosts.to_local_devices(tokenizer.params)
    return lambda images_BHWC: compiled(params, images_BHWC)


def encode_pictures(
    encode: Callable[[np.ndarray], jax.Array],
    pictures: Pictures,
    indices: Iterable[int],
    batch_size: int,
) -> Iterator[Mapping[str, Any] | None]:
    """What is known of pictures, with their codes.

    Args:
      encode: of `image_encoder`.
      pictures: the data set.
      indices: which of them.
      batch_size: pictures per call of `encode`, the last one filled up; one program for all.

    Yields:
      For each index the example with "codes" (int32 (L,)) in place of "image"; None for a broken
      one, which `pictures.skipped` names.
    """
    indices = iter(indices)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        waiting: collections.deque = collections.deque()

        def ask() -> None:
            if batch := list(itertools.islice(indices, batch_size)):
                waiting.append([pool.submit(pictures.__getitem__, index) for index in batch])

        for _ in range(_BATCHES_AHEAD):
            ask()
        while waiting:
            examples = [future.result() for future in waiting.popleft()]
            ask()
            images = [e["image"] if e else pictures.blank for e in examples]
            images += [pictures.blank] * (batch_size - len(images))
            codes_BL = np.asarray(encode(np.stack(images)), np.int32)
            for example, codes_L in zip(examples, codes_BL, strict=False):  # the rest is filling
                if example is None:
                    yield None
                else:
                    known = {key: value for key, value in example.items() if key != "image"}
                    yield {**known, "codes": codes_L}


def encode_in_memory(
    encode: Callable[[np.ndarray], jax.Array], pictures: Pictures, batch_size: int
) -> CodesInMemory:
    """The codes of a whole data set, for one that is small.

    Args:
      encode: of `image_encoder`.
      pictures: the data set; every process encodes all of it.
      batch_size: pictures at a time.

    Raises:
      ValueError: not one picture is usable.
    """
    total = len(pictures)
    rows = encode_pictures(encode, pictures, range(total), batch_size)
    return CodesInMemory(
        f"{pictures.name} as codes",
        list(progress(rows, total, f"codes of {pictures.name}")),
        pictures.skipped,
    )
