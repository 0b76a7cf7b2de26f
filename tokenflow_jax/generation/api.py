"""The public Python API of generation: prompts to pictures.

generator = tfx.Generator.load("runs/generation")
pictures = generator.generate(["red apple", "dog face"], seed=1).images      # uint8
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.text import PromptEncoder, load_text_tokenizer
from tokenflow_jax.generation import sample as generate
from tokenflow_jax.generation.model import VARIANTS, Generation, GenerationConfig
from tokenflow_jax.generation.names import PART
from tokenflow_jax.nets.pixels import to_uint8
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.api import Tokenizer, language_model_dtype, load_tokenizer_of
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.rules import unflatten

# What guidance leads away from in the reference, whose training drops no captions.
REFERENCE_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
_LARGEST_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How pictures are drawn; the defaults are the reference's.

    Attributes:
      guidance: strength of classifier-free guidance at the finest scale; 0 draws without it, in
        half the time.
      passes: (top_k, top_p) of each pass over a scale; a number takes the reference's settings for
        one, two or three passes. 0 switches a filter off.
      negative_prompt: what guidance leads away from; "" for a model that learnt it.
      seed: of all draws.
    """

    guidance: float = generate.GUIDANCE
    passes: tuple[tuple[int, float], ...] | int = 1
    negative_prompt: str = REFERENCE_NEGATIVE
    seed: int = 0

    def __post_init__(self):
        passes = self.passes
        if isinstance(passes, int):
            if passes not in generate.PASSES:
                raise ValueError(f"passes {passes} must be one of {sorted(generate.PASSES)}")
            passes = generate.PASSES[passes]
        object.__setattr__(self, "passes", tuple((int(k), float(p)) for k, p in passes))

    def check(self, config: GenerationConfig) -> None:
        """Raises ValueError that names all that a model cannot do."""
        size, problems = config.codebook_size, []
        if not self.guidance >= 0:
            problems.append(f"guidance {self.guidance} must not be negative")
        if not self.passes:
            problems.append("there is no pass")
        for top_k, top_p in self.passes:
            if not 0 <= top_k <= size:
                problems.append(f"top_k {top_k} must be 0 (off) to {size}, the codebook's size")
            if not 0 <= top_p <= 1:
                problems.append(f"top_p {top_p} must be 0 (off) to 1")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


class Generated(NamedTuple):
    """Pictures and how they came to be.

    Attributes:
      images: uint8 (B, H, W, 3).
      codes: int32 (B, N), coarse to fine.
      recipe: JSON-able: what it takes to draw the same again.
    """

    images: np.ndarray
    codes: np.ndarray
    recipe: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained generation model with its two tokenizers.

    Everything is compiled once per number of images (powers of two) and length of prompts.

    Attributes:
      config: the model's hyper-parameters.
      params: its weights.
      tokenizer: makes pictures of codes.
      prompts: makes ids of text.
      recipe: defaults of `generate`.
      dtype: what the model computes in.
      source: what it was loaded from, for recipes.
      device_mesh: over which `params` are spread; None where one device has all of them. All
        processes of a training run's must draw together.
    """

    config: GenerationConfig
    params: dict
    tokenizer: Tokenizer
    prompts: PromptEncoder
    recipe: Recipe = Recipe()
    dtype: str = "float32"
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device_mesh: mesh.Mesh | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        tokenizer: str | os.PathLike | Tokenizer | None = None,
        *,
        text_tokenizer: str | None = None,
        variant: str | None = None,
        tokenizer_variant: str | None = None,
        ema: bool = True,
        step: int | None = None,
        dtype: str = "auto",
    ) -> "Generator":
        """Loads a generation model, over all devices of this process where there are several.

        Args:
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` wrote, or a
            PyTorch checkpoint.
          tokenizer: the image tokenizer that the model was trained with, or where it is; a
            checkpoint of a training run knows.
          text_tokenizer: "bytes", "words" or a folder; a checkpoint of a training run knows.
          variant: for a PyTorch checkpoint which model it is.
          tokenizer_variant: for a PyTorch tokenizer which model it is.
          ema: takes the moving average of the weights when there is one.
          step: which checkpoint of a workdir; the newest when None.
          dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators.

        Raises:
          CodesError: the tokenizer is not the one that the model was trained with.
          ValueError: no such path, or weights that do not fit.
        """
        path = os.fspath(path)
        dtype = language_model_dtype(dtype)
        config = _torch_config(path, variant)
        source = conversion.open_source(
            path, PART, config, weights=None if ema else "raw", step=step
        )
        saved = source.saved
        known = saved.get("tokenizer", {})
        tokenizer = load_tokenizer_of(path, known, tokenizer, tokenizer_variant)
        text_tokenizer = text_tokenizer or saved.get("text_tokenizer", "")
        length = saved.get("data", {}).get("max_length", 128)
        if not text_tokenizer:
            raise ValueError(
                f"{path} does not say which text tokenizer it was trained with: give it"
                " (--text_tokenizer=FOLDER), for released checkpoints LLaMA-2's"
            )
        device_mesh, held = mesh.answering_mesh(), jnp.dtype(dtype)
        arrays = ((name, np.asarray(t.read(), held)) for name, t in source.arrays.items())
        generator = cls(
            config=source.config,
            params=unflatten(mesh.place_parameters(arrays, device_mesh)),
            tokenizer=tokenizer,
            prompts=PromptEncoder(load_text_tokenizer(text_tokenizer), length),
            recipe=Recipe(**_recipe(saved.get("sampling", {}))),
            dtype=dtype,
            source={"checkpoint": path, "weights": source.weights},
            device_mesh=device_mesh,
        )
        generator.check()
        return generator

    def check(self) -> None:
        """Raises ValueError that names all in which model and tokenizers differ."""
        config, tokenizer, problems = self.config, self.tokenizer.config, []
        for name, ours, theirs in (
            ("scales", config.scales, tokenizer.scales),
            ("codebook_size", config.codebook_size, tokenizer.codebook_size),
            ("code channels", config.code_channels, tokenizer.code_channels),
        ):
            if ours != theirs:
                problems.append(f"{name} are {theirs}, the model's {ours}")
        if self.prompts.image_start != config.image_start:
            problems.append(
                f"the text tokenizer has {self.prompts.image_start} ids (padding included), the "
                f"model {config.image_start}"
            )
        if problems:
            raise ValueError("these tokenizers are not the model's: " + "; ".join(problems))

    def with_params(self, params: dict) -> "Generator":
        """The same with other weights; what is compiled is shared."""
        other = dataclasses.replace(self, params=params)
        other.__dict__.update(_compiled=self._compiled, _decoders=self._decoders)
        return other

    @functools.cached_property
    def codebooks(self) -> Codebooks:
        """The image tokenizer's."""
        params = self.tokenizer.params
        return Codebooks(
            jnp.asarray(params["semantic_codebook"]), jnp.asarray(params["pixel_codebook"])
        )

    @functools.cached_property
    def _compiled(self) -> dict:
        return {}

    def _sampler(self, passes: tuple[tuple[int, float], ...], guided: bool):
        """The jitted sampling loop of some passes; made once."""
        key = (passes, guided)
        if key not in self._compiled:
            model = Generation(self.config, jnp.dtype(self.dtype))
            run = generate.sampling_function(model, self.prompts.pad_id, passes, guided)
            if self.device_mesh is None:
                self._compiled[key] = jax.jit(run)
            else:
                whole = mesh.replicated(self.device_mesh)
                self._compiled[key] = mesh.bind(self.device_mesh, jax.jit(run, out_shardings=whole))
        return self._compiled[key]

    def codes(
        self, prompts: Sequence[str], numbers: Sequence[int], recipe: Recipe, batch_size: int = 16
    ) -> np.ndarray:
        """Draws codes.

        Args:
          prompts: one per image.
          numbers: of each image among those of its prompt; prompt, seed and number alone decide
            what is drawn, not what else is asked for.
          recipe: how.
          batch_size: images at a time.

        Returns:
          int32 (B, N).
        """
        recipe.check(self.config)
        guided = recipe.guidance > 0
        sampler = self._sampler(recipe.passes, guided)
        rows = []
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            texts, keys = list(prompts[some]), _keys(prompts[some], numbers[some], recipe.seed)
            missing = self._filling(len(texts))
            texts += texts[-1:] * missing
            keys = jnp.concatenate([keys, jnp.repeat(keys[-1:], missing, axis=0)])
            ids = self.prompts.encode_all([*texts, recipe.negative_prompt], shortest=True)
            codes = sampler(
                self.params, self.codebooks, ids[:-1], ids[-1:], keys, jnp.float32(recipe.guidance)
            )
            rows.append(np.asarray(codes)[: len(prompts[some])])
        return np.concatenate(rows)

    def _filling(self, count: int) -> int:
        """How many rows are missing to a number that programs are compiled for."""
        parts = 1 if self.device_mesh is None else mesh.batch_parts(self.device_mesh)
        rows = count + _filling(count)
        return rows + -rows % parts - count

    def decode(self, codes_BL: np.ndarray) -> np.ndarray:
        """Pictures of codes, or of their coarsest scales: uint8 (B, H, W, 3)."""
        count = len(codes_BL)
        filled = np.concatenate([codes_BL, np.repeat(codes_BL[-1:], _filling(count), axis=0)])
        features, pixels = self._decoders
        return np.asarray(pixels(self.tokenizer.params, features(self.tokenizer.params, filled)))[
            :count
        ]

    @functools.cached_property
    def _decoders(self):
        """Jitted (weights, codes) -> quantised map, for any number of scales, and -> pixels."""
        model = TokenFlow(self.tokenizer.config, dtype=jnp.dtype(self.tokenizer.dtype))

        def features(params, codes_BL):
            return model.apply({"params": params}, codes_BL, method="features")

        def pixels(params, maps_BHWC):
            images_BHWC, _ = model.apply({"params": params}, maps_BHWC, method="decode_pixels")
            return to_uint8(images_BHWC)

        return jax.jit(features), jax.jit(pixels)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        batch_size: int = 16,
        **changes: Any,
    ) -> Generated:
        """Draws pictures.

        Args:
          prompts: one text or several; a long one is cut (see `prompts.cut_notes`), the empty one
            draws whatever the model likes.
          images_per_prompt: how many of each, one after the other.
          batch_size: images at a time; up to 64.
          **changes: of the default recipe: guidance, passes, negative_prompt, seed.

        Returns:
          Pictures, codes and the recipe, prompts in order.

        Raises:
          ValueError: nothing asked for, or values that this model cannot do.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or images_per_prompt < 1 or not 1 <= batch_size <= _LARGEST_BATCH:
            raise ValueError(
                f"{len(prompts)} prompts, {images_per_prompt} images of each, {batch_size} at a "
                f"time: give at least one prompt and image, and 1 to {_LARGEST_BATCH} at a time"
            )
        recipe = dataclasses.replace(self.recipe, **changes)
        texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        numbers = list(range(images_per_prompt)) * len(prompts)
        codes = self.codes(texts, numbers, recipe, batch_size)
        images = np.concatenate(
            [self.decode(codes[i : i + batch_size]) for i in range(0, len(codes), batch_size)]
        )
        return Generated(images, codes, self.describe(recipe))

    def previews(self, codes_BN: np.ndarray) -> Iterator[np.ndarray]:
        """The pictures after each scale, coarse to fine: uint8 (B, H, W, 3)."""
        for where in self.config.pyramid.slices():
            yield self.decode(codes_BN[:, : where.stop])

    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """A recipe with all that decides on the pictures, JSON-able."""
        return {
            **dataclasses.asdict(recipe),
            "passes": [list(one) for one in recipe.passes],
            "model": dict(self.source),
            "tokenizer": self.tokenizer.identity,
            "text_tokenizer": getattr(self.prompts.text_tokenizer, "name_or_path", ""),
            "text_budget": self.prompts.budget,
            "dtype": self.dtype,
        }


def _filling(count: int) -> int:
    """How many rows are missing to a power of two, the numbers for which programs are compiled."""
    return (1 << (count - 1).bit_length()) - count


def _keys(prompts: Sequence[str], numbers: Sequence[int], seed: int) -> jax.Array:
    """One random key per image."""
    hashes = [zlib.crc32(prompt.encode(errors="replace")) for prompt in prompts]

    def key(prompt: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), number)

    return jax.vmap(key)(jnp.array(hashes, jnp.uint32), jnp.array(numbers, jnp.uint32))


def _torch_config(path: str, variant: str | None) -> GenerationConfig | None:
    """Which model a PyTorch checkpoint holds; a checkpoint of ours knows."""
    if not conversion.is_torch(path):
        if variant is not None:
            raise ValueError(f"{path} knows its own variant: leave it out")
        return None
    if variant not in VARIANTS:
        raise ValueError(
            f"{path} is a PyTorch checkpoint: say which model it holds, variant=one of "
            f"{sorted(VARIANTS)} (got {variant!r})"
        )
    return VARIANTS[variant]


def _recipe(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a training run left."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return {name: value for name, value in sampling.items() if name in names}
