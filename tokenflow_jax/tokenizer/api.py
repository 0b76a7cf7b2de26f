"""The public Python API: images to codes and back."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.tokenizer.fingerprint import fingerprint
from tokenflow_jax.tokenizer.model import VARIANTS, TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.rules import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained TokenFlow tokenizer: `encode`, `decode`, `features`.

    Every method is compiled once per batch shape. In float32 all products have full precision on
    every accelerator, because a code is an argmin.

    Attributes:
      config: the model's hyper-parameters (`image_size`, `scales`, `codebook_size`, ...).
      params: its weights.
      dtype: what encoders and decoders compute in; the quantiser is always float32.
    """

    config: TokenizerConfig
    params: dict
    dtype: str = "float32"

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
        """Loads a tokenizer.

        Args:
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` wrote, or a
            PyTorch file (.pt, .pth, .bin, .safetensors, a folder or index of sharded ones). Pickled
            code is never executed.
          variant: for a PyTorch file which model it is, one of `tokenizer.model.VARIANTS`; a
            checkpoint of ours knows.
          ema: takes the moving average of the weights when the checkpoint has one.
          step: which checkpoint of a workdir; the newest when None.
          dtype: "float32" or "bfloat16".
          scales, pixel_weight: of a PyTorch file whose pyramid or weight of the pixel distance are
            not its variant's; weights do not tell.

        Returns:
          A `Tokenizer`.

        Raises:
          ValueError: no such path or variant, or weights that do not fit (all of them listed).
        """
        path = os.fspath(path)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r}: one of 'float32', 'bfloat16'")
        config = _config(path, variant, {"scales": scales, "pixel_weight": pixel_weight})
        source = conversion.open_source(
            path, PART, config, weights=None if ema else "raw", step=step
        )
        params = {name: jnp.asarray(t.read(), jnp.float32) for name, t in source.arrays.items()}
        return cls(source.config, unflatten(params), dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two tokenizers share if they give the same codes."""
        return fingerprint(self.config, flatten(self.params))

    @property
    def identity(self) -> dict[str, Any]:
        """What a data set of codes, or a model trained on codes, notes of its tokenizer."""
        return {
            "fingerprint": self.fingerprint,
            "codebook_size": self.config.codebook_size,
            "scales": list(self.config.scales),
            "image_size": self.config.image_size,
        }

    @functools.cached_property
    def _model(self) -> TokenFlow:
        return TokenFlow(self.config, dtype=jnp.dtype(self.dtype))

    @functools.cached_property
    def _compiled(self) -> dict:
        """Jitted functions of (params, input); made once, so that nothing recompiles."""

        def encode(params, images_BHWC):
            features = self._model.apply({"params": params}, images_BHWC, method="encode")
            return self._model.apply({"params": params}, features, method="quantize").codes_BL

        def features(params, codes_BL):
            return self._model.apply({"params": params}, codes_BL, method="features")

        def decode(params, codes_BL):
            maps = features(params, codes_BL)
            return self._model.apply({"params": params}, maps, method="decode_pixels")[0]

        def semantics(params, codes_BL):
            maps = features(params, codes_BL)
            return self._model.apply({"params": params}, maps, method="decode_semantics")

        functions = (encode, features, decode, semantics)
        return {function.__name__: jax.jit(function) for function in functions}

    def _run(self, name: str, argument: np.ndarray) -> jax.Array:
        exact = jax.default_matmul_precision("highest")
        with exact if self.dtype == "float32" else contextlib.nullcontext():
            return self._compiled[name](self.params, argument)

    def encode(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Turns images into codes.

        Args:
          images: uint8 (B, H, W, 3), or float (B, H, W, 3) in [-1, 1]; H = W = config.image_size.

        Returns:
          int32 codes (B, L), coarse to fine, row by row within a scale.

        Raises:
          ValueError: wrong shape, dtype or range, or values that are not finite.
        """
        return self._run("encode", self._images(images))

    def decode(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Turns codes back into images.

        Args:
          codes_BL: integer codes of all scales, or of the coarsest scales only.

        Returns:
          float32 (B, H, W, 3), nominally in [-1, 1] and not clamped.

        Raises:
          ValueError: codes out of range, or a number of codes that ends inside a scale.
        """
        return self._run("decode", self._codes(codes_BL))

    def features(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """The quantised map of codes at the final scale: what a language model reads.

        Args:
          codes_BL: as for `decode`.

        Returns:
          float32 (B, N, C), N grid cells row by row; semantic channels first, then pixel ones.

        Raises:
          ValueError: as `decode`.
        """
        maps_BHWC = self._run("features", self._codes(codes_BL))
        return maps_BHWC.reshape(maps_BHWC.shape[0], -1, maps_BHWC.shape[-1])

    def semantics(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """The teacher's patch features as reconstructed from codes: (B, N, teacher_width)."""
        return self._run("semantics", self._codes(codes_BL))

    def _images(self, images) -> np.ndarray | jax.Array:
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this tokenizer takes (batch, {size}, "
                f"{size}, 3); crop and resize first (tokenflow_jax.data.images.center_crop)"
            )
        if images.dtype == np.uint8:
            return np.asarray(images, np.float32) / np.float32(127.5) - np.float32(1)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images of dtype {images.dtype}: give uint8, or floats in [-1, 1]")
        low, high = float(images.min(initial=0.0)), float(images.max(initial=0.0))
        if not (low >= -1.001 and high <= 1.001):  # also false for NaN
            raise ValueError(
                f"float images span {low:g} to {high:g}, not [-1, 1]; for 0..255 give uint8, for "
                "0..1 give 2 * images - 1"
            )
        return images.astype(np.float32)

    def _codes(self, codes_BL) -> np.ndarray:
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
        return codes_BL.astype(np.int32)


def load_tokenizer_of(
    model: str,
    known: Mapping[str, Any],
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    variant: str | None = None,
) -> Tokenizer:
    """The image tokenizer that a language model was trained with.

    Args:
      model: where the model is, for messages.
      known: "path", "variant" and "fingerprint" of its tokenizer, as far as its checkpoint knows.
      tokenizer: it, or where it is now; where it was when None.
      variant: which model a PyTorch tokenizer is.

    Raises:
      CodesError: the tokenizer is not the one that the model was trained with.
      ValueError: nobody says where it is, it is not there, or it cannot be loaded.
    """
    if tokenizer is None:
        tokenizer, variant = known.get("path"), variant or known.get("variant")
        if not tokenizer:
            raise ValueError(
                f"{model} does not say where the image tokenizer is that it was trained with: "
                "give it (--tokenizer=)"
            )
    if not isinstance(tokenizer, Tokenizer):
        if not epath.Path(tokenizer).exists():
            raise ValueError(
                f"the image tokenizer {os.fspath(tokenizer)!r} of {model} is not there; say where "
                "it is (--tokenizer=)"
            )
        tokenizer = Tokenizer.load(tokenizer, variant or None)
    if known.get("fingerprint"):
        check_tokenizer(model, known, tokenizer.identity)
    return tokenizer


def language_model_dtype(name: str) -> str:
    """What a language model computes in: "auto" is bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r}: one of 'auto', 'float32', 'bfloat16'")
    return name


def _config(path: str, variant: str | None, options: Mapping[str, Any]) -> TokenizerConfig | None:
    """The config that was asked for; None for a checkpoint of ours, which knows its own."""
    options = {name: value for name, value in options.items() if value is not None}
    is_torch = conversion.is_torch(path)
    if options and not is_torch:
        raise ValueError(f"{path} knows its own {' and '.join(options)}: leave them out")
    if variant is None and not is_torch:
        return None
    if variant not in VARIANTS:
        kind = "a PyTorch checkpoint" if is_torch else "a checkpoint of ours"
        raise ValueError(
            f"{path} is {kind}: say which model it holds, variant=one of {sorted(VARIANTS)} "
            f"(got {variant!r})"
        )
    return dataclasses.replace(VARIANTS[variant], **options)
