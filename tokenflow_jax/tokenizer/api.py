"""The public Python API: images to codes and back."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokenflow_jax.data.pictures import Picture, is_single
from tokenflow_jax.tokenizer import inputs
from tokenflow_jax.tokenizer.fingerprint import identity
from tokenflow_jax.tokenizer.frozen import full_precision, image_codes, open_weights
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.weights.card import UNKNOWN, Trained
from tokenflow_jax.weights.conversion import Source
from tokenflow_jax.weights.pretrained import Pretrained, save_folder
from tokenflow_jax.weights.rules import flatten, unflatten

BATCH = 32  # images at a time, unless asked otherwise


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer(Pretrained):
    """A trained TokenFlow tokenizer: `encode`, `decode`, `features`; compiled per batch shape.

    In float32 all products have full precision on every accelerator: a code is an argmin.
    """

    config: TokenizerConfig  # hyper-parameters: image_size, scales, codebook_size, ...
    params: dict
    dtype: str = "float32"  # of encoders and decoders; the quantizer is always float32
    trained: Trained = UNKNOWN  # where the weights come from, for `save_pretrained`

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
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` or
            `save_pretrained` wrote, or a PyTorch file (.pt, .pth, .bin, .safetensors, a folder or
            index of shards). Pickled code is never executed.
          variant: one of `tokenizer.model.VARIANTS`, for a PyTorch file that is not of ours.
          ema: use the moving average of the weights if there is one.
          step: checkpoint of a workdir; the newest by default.
          dtype: "float32" or "bfloat16".
          scales, pixel_weight: override the variant of a PyTorch file, which does not record them.

        Raises:
          ValueError: no such path or variant, or weights that do not fit (all of them listed).
        """
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r}: one of 'float32', 'bfloat16'")
        path, source = open_weights(
            path, variant, ema=ema, step=step, scales=scales, pixel_weight=pixel_weight
        )
        return cls.of(path, source, dtype)

    @classmethod
    def of(cls, path: str, source: Source, dtype: str = "float32") -> "Tokenizer":
        """Read the arrays of weights that `open_weights` opened."""
        params = {name: jnp.asarray(t.read(), jnp.float32) for name, t in source.arrays.items()}
        return cls(source.config, unflatten(params), dtype, Trained.of(path, source))

    from_pretrained = load

    def _save(self, folder: str | os.PathLike, **options: Any) -> None:
        config = self.config
        rows = {
            "codes": f"{config.length} of {config.codes:,}",
            **{n: v for n, v in self.identity.items() if n != "codebook_size"},
            "semantic_encoder": config.semantic_encoder,
        }
        fit = {"image_size": config.image_size, "fit": "center_crop", "range": [-1, 1]}
        more = {"tokenizer": self.identity, "preprocessing": fit}
        what = (PART, config, self.params, more, rows, self.trained)
        save_folder(folder, *what, **options)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The record that data sets of codes and models trained on codes keep of the tokenizer."""
        return identity(self.config, flatten(self.params))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, the same for all tokenizers that give the same codes."""
        return self.identity["fingerprint"]

    @functools.cached_property
    def model(self) -> TokenFlow:
        return TokenFlow(self.config, dtype=jnp.dtype(self.dtype))

    @functools.cached_property
    def codebooks(self) -> Codebooks:
        """The codebooks, on the default device."""
        return jax.tree.map(jnp.asarray, self.config.codebooks(self.params))

    def encode_fn(self, params: Any, images_BHWC: jax.Array) -> jax.Array:
        """Return codes (B, L) of images, uint8 or in [-1, 1]; pure, for `jax.jit` and `jax.vmap`.

        `params` are `self.params`, wherever they are placed; `decode_fn` and `features_fn` alike:

            places = NamedSharding(mesh, PartitionSpec("data"))
            encode = jax.jit(tokenizer.encode_fn, in_shardings=(None, places), out_shardings=places)
            codes_BL = encode(tokenizer.params, images_BHWC)
        """
        return image_codes(self.model, params, images_BHWC)

    def decode_fn(self, params: Any, codes_BL: jax.Array) -> jax.Array:
        """Return images (B, H, H, 3) of codes, of all scales or the coarsest; pure."""
        return self._pixels_fn(params, self._method("features")(params, codes_BL))

    def features_fn(self, params: Any, codes_BL: jax.Array) -> jax.Array:
        """Return the quantized map (B, N, C) of codes; pure."""
        maps_BHWC = self._method("features")(params, codes_BL)
        return maps_BHWC.reshape(maps_BHWC.shape[0], -1, maps_BHWC.shape[-1])

    def _method(self, name: str) -> Callable[[Any, jax.Array], Any]:
        """Return a method of the model as a function of (params, array)."""

        def apply(params: Any, x: jax.Array) -> Any:
            with full_precision(self.dtype):
                return self.model.apply({"params": params}, x, method=name)

        return apply

    def _pixels_fn(self, params: Any, maps_BHWC: jax.Array) -> jax.Array:
        return self._method("decode_pixels")(params, maps_BHWC)[0]

    @functools.cached_property
    def compiled(self) -> dict[str, Callable[[Any, Any], jax.Array]]:
        """Jitted functions of (params, array)."""
        # "pixels" and "semantics" take maps, not codes: one program for any number of scales.
        return {
            "encode": jax.jit(self.encode_fn),
            "maps": jax.jit(self._method("encode")),  # before quantization, of floats
            "features": jax.jit(self._method("features")),
            "pixels": jax.jit(self._pixels_fn),
            "semantics": jax.jit(self._method("decode_semantics")),
        }

    def _run(self, name: str, array: np.ndarray | jax.Array) -> jax.Array:
        return self.compiled[name](self.params, array)

    def encode(
        self,
        images: Picture | Iterable[Picture],
        value_range: tuple[int, int] | None = None,
        *,
        resize: bool = True,
        batch_size: int = BATCH,
    ) -> jax.Array:
        """Turn images into int32 codes (B, L), coarse to fine, row by row within a scale.

        Args:
          images: a PIL image, a path, the bytes of a file, or an array (H, W, 3), uint8 or float;
            or a list, a generator or an array (B, H, W, 3) of them. A single one is a batch of one.
            Gray, palette and transparent pictures become RGB as in training; EXIF orientation is
            ignored, as there.
          value_range: of floats, (-1, 1) or (0, 1). None takes [-1, 1], but refuses a batch without
            a negative value, which is far more likely to be [0, 1].
          resize: shrink or enlarge pictures of another size and crop their middle, as evaluation
            does; not of floats. False insists on config.image_size.
          batch_size: images at a time; only these are in memory.

        Raises:
          ValueError: no images, one that cannot be read, wrong shape, dtype or range, or values
            that are not finite.
        """
        size, rows = self.config.image_size, []
        for number, images_BHWC in enumerate(
            inputs.batches(images, size, batch_size, value_range, resize)
        ):
            count = len(images_BHWC)
            if number:  # another shape would compile another program
                images_BHWC = _padded(images_BHWC, batch_size)
                rows[-1] = np.asarray(rows[-1])  # wait, so that no more than two are under way
            rows.append(self._run("encode", images_BHWC)[:count])
        return rows[0] if len(rows) == 1 else jnp.asarray(np.concatenate(rows))

    def decode(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Turn codes into float32 images (B, H, H, 3), nominally in [-1, 1], not clamped.

        Args:
          codes_BL: integer codes of all scales, or of the coarsest scales only.

        Raises:
          ValueError: codes out of range, or a number of codes that ends inside a scale.
        """
        return self._run("pixels", self._maps(codes_BL))

    def to_images(
        self, codes_BL: np.ndarray | jax.Array | Sequence, *, batch_size: int = BATCH
    ) -> list[Image.Image]:
        """Turn codes into PIL images, `batch_size` at a time; see `decode`."""
        codes_BL, made = self._codes(codes_BL), []
        for start in range(0, len(codes_BL), batch_size):
            rows = codes_BL[start : start + batch_size]
            pixels_BHWC = self.decode(_padded(rows, batch_size) if start else rows)
            made += inputs.to_pil(pixels_BHWC[: len(rows)])
        return made

    def reconstruct(
        self,
        images: Picture | Iterable[Picture],
        scales: int | None = None,
        *,
        batch_size: int = BATCH,
        **options: Any,
    ) -> Image.Image | list[Image.Image]:
        """Encode and decode: return a PIL image for a single one, else a list.

        Args:
          images, batch_size, options: see `encode`.
          scales: the number of coarsest scales that are decoded; all by default.
        """
        known = self.config.pyramid.slices()
        if scales is not None and not 1 <= scales <= len(known):
            raise ValueError(f"scales={scales}: this tokenizer has 1 to {len(known)}")
        codes_BL = self.encode(images, batch_size=batch_size, **options)
        tokens = known[(scales or len(known)) - 1].stop
        codes_BL = np.asarray(codes_BL)[:, : tokens * self.config.quantizer.heads]
        made = self.to_images(codes_BL, batch_size=batch_size)
        return made[0] if is_single(images) else made

    def features(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Return the quantized map of codes, which a language model reads: float32 (B, N, C)."""
        maps_BHWC = self._maps(codes_BL)
        return maps_BHWC.reshape(maps_BHWC.shape[0], -1, maps_BHWC.shape[-1])

    def semantics(self, codes_BL: np.ndarray | jax.Array | Sequence) -> jax.Array:
        """Return the teacher's patch features rebuilt from codes: (B, N, teacher_width)."""
        return self._run("semantics", self._maps(codes_BL))

    def _maps(self, codes_BL) -> jax.Array:
        return self._run("features", self._codes(codes_BL))

    def _codes(self, codes_BL) -> np.ndarray:
        codes_BL = np.asarray(codes_BL)
        if codes_BL.ndim != 2 or not np.issubdtype(codes_BL.dtype, np.integer):
            raise ValueError(
                f"codes of shape {codes_BL.shape} and dtype {codes_BL.dtype}: give integers of "
                "shape (batch, codes per image)"
            )
        self.config.pyramid.prefix(codes_BL.shape[1], self.config.quantizer.heads)
        size = self.config.codes
        if codes_BL.size and not (codes_BL.min() >= 0 and codes_BL.max() < size):
            raise ValueError(
                f"codes span {codes_BL.min()} to {codes_BL.max()}; this codebook has 0 to "
                f"{size - 1}"
            )
        return codes_BL.astype(np.int32)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Tokenizer of {config.image_size} px, {config.length} codes of "
            f"{config.codes:,}, scales {config.scales},\n"
            f"  {config.semantic_encoder} encoder, {count_parameters(self.params):,} parameters, "
            f"{self.dtype}"
        )


def count_parameters(params: Any) -> int:
    return sum(array.size for array in jax.tree.leaves(params))


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Repeat the last row up to `count` rows."""
    return np.pad(rows, ((0, count - len(rows)), *((0, 0),) * (rows.ndim - 1)), mode="edge")
