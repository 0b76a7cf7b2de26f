"""Encode a data set of pictures: threads decode the files, the devices encode batch by batch."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.captions.codes import CodesInMemory
from tokenflow_jax.log import progress
from tokenflow_jax.parallel import hosts
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.frozen import image_codes

_BATCHES_AHEAD = 2


def image_encoder(tokenizer: Tokenizer) -> Callable[[np.ndarray], jax.Array]:
    """Return a compiled function from uint8 (B, H, H, 3) to codes (B, L), on the local devices."""
    compiled = hosts.over_local_devices(functools.partial(image_codes, tokenizer.model))
    params = hosts.to_local_devices(tokenizer.params)
    return lambda images_BHWC: compiled(params, images_BHWC)


def encode_pictures(
    encode: Callable[[np.ndarray], jax.Array],
    pictures: Pictures,
    indices: Iterable[int],
    batch_size: int,
) -> Iterator[Mapping[str, Any] | None]:
    """Yield each picture's example with int32 "codes" (L,) for "image", None for a broken one."""
    indices = iter(indices)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        batches = iter(lambda: list(itertools.islice(indices, batch_size)), [])
        started = ([pool.submit(pictures.__getitem__, i) for i in batch] for batch in batches)
        waiting = collections.deque(itertools.islice(started, _BATCHES_AHEAD))
        while waiting:
            examples = [future.result() for future in waiting.popleft()]
            waiting.extend(itertools.islice(started, 1))
            images = [e["image"] if e else pictures.blank for e in examples]
            images += [pictures.blank] * (batch_size - len(images))
            codes_BL = np.asarray(encode(np.stack(images)), np.int32)
            for example, codes_L in zip(examples, codes_BL, strict=False):  # the rest is padding
                if example is None:
                    yield None
                else:
                    known = {key: value for key, value in example.items() if key != "image"}
                    yield {**known, "codes": codes_L}


def encode_in_memory(
    encode: Callable[[np.ndarray], jax.Array], pictures: Pictures, batch_size: int
) -> CodesInMemory:
    """Encode a whole small data set, in every process; ValueError if no picture is usable."""
    total = len(pictures)
    rows = encode_pictures(encode, pictures, range(total), batch_size)
    return CodesInMemory(
        f"{pictures.name} as codes",
        list(progress(rows, total, f"codes of {pictures.name}")),
        pictures.skipped,
    )
