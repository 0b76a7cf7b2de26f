"""The public Python API: images to codes and back."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.tokenizer.fingerprint import fingerprint
from tokenflow_jax.tokenizer.frozen import full_precision, image_codes
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.rules import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained TokenFlow tokenizer: `encode`, `decode`, `features`; compiled per batch shape.

    In float32 all products have full precision on every accelerator: a code is an argmin.
    """

    config: TokenizerConfig  # hyper-parameters: image_size, scales, codebook_size, ...
    params: dict
    dtype: str = "float32"  # of encoders and decoders; the quantizer is always float32

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        variant: str | None = None,
        *,
        ema: bool = True,
        step: int | None = None,
        dtype: str = "float32",
        scales: Sequence[int] | None = None,
        pixel_weight: float | None = None,
    ) -> "Tokenizer":
        """Load a tokenizer.

        Args:
          path: a training workdir, one of its checkpoints, a directory that `tokenflow_jax.convert`
            wrote, or a PyTorch file (.pt, .pth, .bin, .safetensors, a folder or index of shards).
            Pickled code is never executed.
          variant: one of `tokenizer.model.VARIANTS`, for a PyTorch file; our checkpoints record it.
          ema: use the moving average of the weights if there is one.
          step: checkpoint of a workdir; the newest by default.
          dtype: "float32" or "bfloat16".
          scales, pixel_weight: override the variant of a PyTorch file, which does not record them.

        Raises:
          ValueError: no such path or variant, or weights that do not fit (all of them listed).
        """
        path = os.fspath(path)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r}: one of 'float32', 'bfloat16'")
        changes = {"scales": scales, "pixel_weight": pixel_weight}
        changes = {name: value for name, value in changes.items() if value is not None}
        config = variant_config(path, variant, VARIANTS)
        if changes and not conversion.is_torch(path):
            raise ValueError(f"{path} knows its own {' and '.join(changes)}: leave them out")
        if changes:
            config = dataclasses.replace(config, **changes)
        weights = None if ema else "raw"
        source = conversion.open_source(path, PART, config, weights=weights, step=step)
        params = {name: jnp.asarray(t.read(), jnp.float32) for name, t in source.arrays.items()}
        return cls(source.config, unflatten(params), dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, the same for all tokenizers that give the same codes."""
        return fingerprint(self.config, flatten(self.params))

    @property
    def identity(self) -> dict[str, Any]:
        """The record that data sets of codes and models trained on codes keep of the tokenizer."""
        return {
            "fingerprint": self.fingerprint,
            "codebook_size": self.config.codebook_size,
            "scales": list(self.config.scales),
            "image_size": self.config.image_size,
        }

    @functools.cached_property
    def model(self) -> TokenFlow:
        return TokenFlow(self.config, dtype=jnp.dtype(self.dtype))

    @functools.cached_property
    def codebooks(self) -> Codebooks:
        """The codebooks, on the default device."""
        return Codebooks(*map(jnp.asarray, Codebooks.of(self.params)))

    @functools.cached_property
    def compiled(self) -> dict[str, Callable[[Any, Any], jax.Array]]:
        """Jitted functions of (params, array)."""

        # "pixels" and "semantics" take maps, not codes: one program for any number of scales.
        def jitted(method: str) -> Callable:
            return jax.jit(lambda params, x: self.model.apply({"params": params}, x, method=method))

        def pixels(params, maps_BHWC):
            return self.model.apply({"params": params}, maps_BHWC, method="decode_pixels")[0]

        return {
            "encode": jax.jit(functools.partial(image_codes, self.model)),
            "features": jitted("features"),
            "pixels": jax.jit(pixels),
            "semantics": jitted("decode_semantics"),
        }

    def _run(self, name: str, array: np.ndarray | jax.Array) -> jax.Array:
        with full_precision(self.dtype):
            return self.compiled[name](self.params, array)

    def encode(
        self, images: np.ndarray | jax.Array, value_range: tuple[int, int] | None = None
    ) -> jax.Array:
        """Turn images into int32 codes (B, L), coarse to fine, row by row within a scale.

        Args:
          images: uint8 or float (B, H, H, 3); H = config.image_size.
          value_range: of floats, (-1, 1) or (0, 1). None takes [-1, 1], but refuses a batch without
            a negative value, which is far more likely to be [0, 1].

        Raises:
          ValueError: wrong shape, dtype or range, or values that are not finite.
        """
        return self._run("encode", self._images(images, value_range))

    def decode(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Turn codes into float32 images (B, H, H, 3), nominally in [-1, 1], not clamped.

        Args:
          codes_BL: integer codes of all scales, or of the coarsest scales only.

        Raises:
          ValueError: codes out of range, or a number of codes that ends inside a scale.
        """
        return self._run("pixels", self._maps(codes_BL))

    def features(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Return the quantized map of codes, which a language model reads: float32 (B, N, C)."""
        maps_BHWC = self._maps(codes_BL)
        return maps_BHWC.reshape(maps_BHWC.shape[0], -1, maps_BHWC.shape[-1])

    def semantics(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Return the teacher's patch features rebuilt from codes: (B, N, teacher_width)."""
        return self._run("semantics", self._maps(codes_BL))

    def _images(self, images, value_range) -> np.ndarray | jax.Array:
        size = self.config.image_size
        shape = getattr(images, "shape", f"<{type(images).__name__}>")
        if len(shape) != 4 or shape[1:] != (size, size, 3) or not shape[0]:
            raise ValueError(
                f"images of shape {shape}: this tokenizer takes an array (batch, {size}, {size}, "
                "3); crop and resize first (tokenflow_jax.data.images.center_crop)"
            )
        value_range = None if value_range is None else tuple(map(float, value_range))
        if images.dtype == np.uint8:
            return to_float(np.asarray(images))
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images of dtype {images.dtype}: give uint8, or floats in [-1, 1]")
        if value_range not in (None, (-1, 1), (0, 1)):
            raise ValueError(f"value_range {value_range!r}: one of (-1, 1), (0, 1)")
        low, high = float(images.min(initial=np.inf)), float(images.max(initial=-np.inf))
        least = 0 if value_range == (0, 1) else -1
        if images.size and not (low >= least - 1e-3 and high <= 1.001):  # also false for NaN
            raise ValueError(
                f"float images span {low:g} to {high:g}, not [{least}, 1]; for 0..255 give uint8, "
                "for 0..1 value_range=(0, 1)"
            )
        if value_range is None and low >= 0 and images.size:
            raise ValueError(
                f"float images span {low:g} to {high:g}: say value_range=(0, 1), as ToTensor gives "
                "them, or (-1, 1)"
            )
        images = images.astype(np.float32)
        return 2 * images - 1 if least == 0 else images

    def _maps(self, codes_BL) -> jax.Array:
        codes_BL = np.asarray(codes_BL)
        if codes_BL.ndim != 2 or not np.issubdtype(codes_BL.dtype, np.integer):
            raise ValueError(
                f"codes of shape {codes_BL.shape} and dtype {codes_BL.dtype}: give integers of "
                "shape (batch, codes per image)"
            )
        self.config.pyramid.prefix(codes_BL.shape[1])
        size = self.config.codebook_size
        if codes_BL.size and not (codes_BL.min() >= 0 and codes_BL.max() < size):
            raise ValueError(
                f"codes span {codes_BL.min()} to {codes_BL.max()}; this codebook has 0 to "
                f"{size - 1}"
            )
        return self._run("features", codes_BL.astype(np.int32))


def variant_config(path: str, variant: str | None, variants: Mapping[str, Any]) -> Any:
    """Return the config of a named variant; None for a checkpoint of ours without a name."""
    is_torch = conversion.is_torch(path)
    if variant is None and not is_torch:
        return None
    if variant not in variants:
        kind = "a PyTorch checkpoint" if is_torch else "a checkpoint of ours"
        raise ValueError(
            f"{path} is {kind}: say which model it holds, variant=one of {sorted(variants)} "
            f"(got {variant!r})"
        )
    return variants[variant]
