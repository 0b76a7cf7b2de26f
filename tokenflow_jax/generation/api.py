"""The public Python API of generation: prompts to pictures.

generator = tfx.Generator.load("runs/generation")
drawn = generator.generate(["red apple", "dog face"], seed=1)
drawn.pictures[0].save("apple.png")     # PIL; drawn.images is uint8 (2, H, H, 3)
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokenflow_jax.data.pictures import Picture
from tokenflow_jax.data.text import PromptEncoder, load_text_tokenizer
from tokenflow_jax.generation.edit import Edit, request
from tokenflow_jax.generation.model import VARIANTS, Generation, GenerationConfig
from tokenflow_jax.generation.names import PART
from tokenflow_jax.generation.sample import Recipe, Sampler, image_keys
from tokenflow_jax.nets.pixels import to_uint8
from tokenflow_jax.parallel import mesh, placement
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.inputs import to_pil
from tokenflow_jax.tokenizer.loading import describe, load_model, save_language_model
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.card import UNKNOWN, Trained
from tokenflow_jax.weights.pretrained import Pretrained

_LARGEST_BATCH = 64
_to_uint8 = jax.jit(to_uint8)


class Generated(NamedTuple):
    images: np.ndarray  # uint8 (B, H, H, 3)
    codes: np.ndarray  # int32 (B, N), coarse to fine
    recipe: dict[str, Any]  # JSON-able: all that it takes to sample the same again

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as PIL images."""
        return to_pil(self.images)


@dataclasses.dataclass(frozen=True, repr=False)
class Generator(Pretrained):
    """A trained generation model with its two tokenizers.

    Everything compiles once per number of images (powers of two) and length of prompts.
    """

    config: GenerationConfig
    params: dict
    tokenizer: Tokenizer  # turns codes into pictures
    prompts: PromptEncoder  # turns text into ids
    recipe: Recipe = dataclasses.field(default_factory=Recipe)  # defaults of `generate`
    dtype: str = "float32"  # of the model's computation
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for recipes
    # Holds `params`; None if one device has all of them. All processes of a training run's mesh
    # must sample together.
    device_mesh: mesh.Mesh | None = None
    trained: Trained = UNKNOWN  # where the weights come from, for `save_pretrained`
    model: Generation | None = None  # runs `params`; None: the plain one

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
        weights_dtype: str = "",
    ) -> "Generator":
        """Load a generation model, spread over all devices of this process.

        Args:
          path: a training workdir, one of its checkpoints, what `tokenflow_jax.convert` or
            `save_pretrained` wrote, or a PyTorch checkpoint.
          tokenizer: the image tokenizer that the model was trained with, or its path.
          text_tokenizer: a name of `data.built_in_text` or a folder; models of ours record it.
          variant, tokenizer_variant: the models in PyTorch files that are not of ours.
          ema: use the moving average of the weights if there is one.
          step: checkpoint of a workdir; the newest by default.
          dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
          weights_dtype: of the decoder's linear layers, if not `dtype`: "int8" halves a bfloat16
            model's memory; "int4", "nf4" quarter it and cost accuracy. Needs qwix.

        Raises:
          CodesError: the tokenizer is not the one that the model was trained with.
          ValueError: no such path, or weights that do not fit.
        """
        path = os.fspath(path)
        if variant is not None and not conversion.is_torch(path):
            raise ValueError(f"{path} knows its own variant: leave it out")
        model = load_model(
            path,
            PART,
            Generation,
            conversion.variant_config(path, variant, VARIANTS),
            tokenizer=tokenizer,
            tokenizer_variant=tokenizer_variant,
            weights=None if ema else "raw",
            step=step,
            dtype=dtype,
            weights_dtype=weights_dtype,
        )
        text_tokenizer = text_tokenizer or model.saved.get("text_tokenizer")
        length = model.saved.get("data", {}).get("max_length", 128)
        if not text_tokenizer:
            raise ValueError(
                f"{path} does not name the text tokenizer that it was trained with: give it "
                "(--text_tokenizer=FOLDER), for released checkpoints LLaMA-2's"
            )
        generator = cls(
            config=model.config,
            params=model.params,
            tokenizer=model.tokenizer,
            prompts=PromptEncoder(load_text_tokenizer(text_tokenizer), length),
            recipe=Recipe.recorded(model.saved),
            dtype=model.dtype,
            source={"checkpoint": path, "weights": model.trained.weights},
            device_mesh=model.device_mesh,
            trained=model.trained,
            model=model.model,
        )
        generator.check()
        return generator

    from_pretrained = load

    def _save(self, folder: str | os.PathLike, **options: Any) -> None:
        more = {
            "data": {"max_length": self.prompts.budget},
            "sampling": dataclasses.asdict(self.recipe),
        }
        text_tokenizer = self.prompts.text_tokenizer
        save_language_model(self, folder, PART, more, text_tokenizer, **options)

    def check(self) -> None:
        """Raise ValueError naming all differences between the model and its tokenizers."""
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
        """Return a copy with other weights that shares the compiled programs."""
        other = dataclasses.replace(self, params=params)
        other.__dict__["_compiled"] = self._compiled
        return other

    def __repr__(self) -> str:
        return describe("Generator", self, self.prompts.text_tokenizer)

    @property
    def codebooks(self) -> Codebooks:
        return self.tokenizer.codebooks

    @functools.cached_property
    def _compiled(self) -> dict:
        return {}

    def _sampler(self, passes: tuple[tuple[int, float], ...]) -> Callable[..., jax.Array]:
        """Return the jitted sampling loop; made once for every choice of passes."""
        if passes not in self._compiled:
            model = self.model or Generation(self.config, jnp.dtype(self.dtype))
            sampler = Sampler(model, self.prompts.pad_id, passes)
            jit = functools.partial(jax.jit, compiler_options=placement.fast_to_compile())
            if self.device_mesh is None:
                self._compiled[passes] = jit(sampler)
            else:
                jitted = jit(sampler, out_shardings=mesh.replicated(self.device_mesh))
                self._compiled[passes] = mesh.bind(self.device_mesh, jitted)
        return self._compiled[passes]

    def codes(
        self,
        prompts: Sequence[str],
        numbers: Sequence[int],
        recipe: Recipe,
        batch_size: int = 16,
        edit: Edit | None = None,
    ) -> np.ndarray:
        """Sample codes (B, N); `numbers` are the images' numbers among those of their prompt.

        Prompt, seed and number alone decide what is drawn, not what else is asked for.
        """
        recipe.check(self.config)
        sampler, guidance = self._sampler(recipe.passes), jnp.float32(recipe.guidance)
        parts = 1 if self.device_mesh is None else mesh.batch_parts(self.device_mesh)
        rows = []
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            count = len(texts)
            missing = _padded(count, parts) - count
            keys = image_keys(texts, numbers[start : start + batch_size], recipe.seed)
            keys = jnp.concatenate([keys, jnp.repeat(keys[-1:], missing, axis=0)])
            texts += texts[-1:] * missing
            ids = self.prompts.encode_all([*texts, recipe.negative_prompt], shortest=True)
            negative = ids[-1:] if recipe.guidance > 0 else None
            codes = sampler(self.params, self.codebooks, ids[:-1], negative, keys, guidance, edit)
            rows.append(np.asarray(codes)[:count])
        return np.concatenate(rows)

    def decode(self, codes_BL: np.ndarray) -> np.ndarray:
        """Turn codes, or their coarsest scales, into pictures: uint8 (B, H, H, 3)."""
        count, run, params = len(codes_BL), self.tokenizer.compiled, self.tokenizer.params
        last = np.repeat(codes_BL[-1:], _padded(count) - count, axis=0)
        maps_BHWC = run["features"](params, np.concatenate([codes_BL, last]))
        return np.asarray(_to_uint8(run["pixels"](params, maps_BHWC)))[:count]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        batch_size: int = 16,
        image: Picture | None = None,
        mask: Picture | None = None,
        strength: float | None = None,
        keep: int | None = None,
        outpaint: Sequence[float] = (),
        **changes: Any,
    ) -> Generated:
        """Sample pictures, in the prompts' order, with their codes and recipe.

        Args:
          prompts: one text or several; a long one is cut (see `prompts.cut_notes`), an empty one
            lets the model choose.
          images_per_prompt: pictures of each prompt, one after the other.
          batch_size: images at a time; up to 64.
          image, mask, strength, keep, outpaint: draw into this picture; see `edit.request`.
          **changes: to the default recipe: guidance, passes, negative_prompt, seed.

        Raises:
          ValueError: no prompt or image, or options that do not suit the model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or images_per_prompt < 1 or not 1 <= batch_size <= _LARGEST_BATCH:
            raise ValueError(
                f"{len(prompts)} prompts, {images_per_prompt} images of each, {batch_size} at a "
                f"time: give at least one prompt and image, and 1 to {_LARGEST_BATCH} at a time"
            )
        recipe = dataclasses.replace(self.recipe, **changes)
        asked = request(self.tokenizer, image, mask, strength, keep, outpaint)
        texts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        numbers = list(range(images_per_prompt)) * len(prompts)
        codes = self.codes(texts, numbers, recipe, batch_size, asked.edit)
        images = np.concatenate(
            [self.decode(codes[i : i + batch_size]) for i in range(0, len(codes), batch_size)]
        )
        return Generated(images, codes, self.describe(recipe, asked.about))

    def previews(self, codes_BN: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the pictures after each scale, coarse to fine: uint8 (B, H, H, 3)."""
        for where in self.config.pyramid.slices():
            yield self.decode(codes_BN[:, : where.stop])

    def describe(self, recipe: Recipe, edit: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the recipe and everything else that decides on the pictures, JSON-able."""
        return {
            **dataclasses.asdict(recipe),
            "passes": [list(one) for one in recipe.passes],
            "model": dict(self.source),
            "tokenizer": self.tokenizer.identity,
            "text_tokenizer": getattr(self.prompts.text_tokenizer, "name_or_path", ""),
            "text_budget": self.prompts.budget,
            "dtype": self.dtype,
            **({"edit": edit} if edit else {}),
        }


def _padded(count: int, parts: int = 1) -> int:
    """Round up to a power of two, so that few programs are compiled, and a multiple of `parts`."""
    rows = 1 << (count - 1).bit_length()
    return rows + -rows % parts
