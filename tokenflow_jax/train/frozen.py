"""The frozen teacher that the semantic half learns from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax.convert import rules
from tokenflow_jax.convert.clip import CLIP_VISUAL
from tokenflow_jax.convert.teacher import load_teacher
from tokenflow_jax.convert.torch_files import open_state_dict
from tokenflow_jax.models.vit import ViT, ViTConfig

PyTree = Any
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher: module, weights, and normalisation of its input (images in [0, 1])."""

    module: ViT
    params: PyTree
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalisation(self) -> dict[str, tuple[float, float, float]]:
        """Mean and deviation, as `train.tokenizer.Trainer` names them."""
        return {"teacher_mean": self.mean, "teacher_std": self.std}


def make_teacher(config: ml_collections.ConfigDict, dtype: jnp.dtype) -> Teacher | None:
    """Loads the teacher that `config.teacher` asks for.

    Args:
      config: `config.teacher`: source "shipped", "clip" (with `weights`), "random" (benchmarks
        only) or "none".
      dtype: computation dtype.

    Returns:
      The teacher, or None.

    Raises:
      ValueError: unknown source, missing or unfitting weights.
    """
    if config.source == "none":
        return None
    if config.source == "shipped":
        metadata, params = load_teacher()
        vit = ViTConfig(**metadata["vit"])
        return Teacher(ViT(vit, dtype), params, tuple(metadata["mean"]), tuple(metadata["std"]))
    vit = ViTConfig(**config.vit)
    module = ViT(vit, dtype)
    image = jnp.zeros((1, vit.image_size, vit.image_size, 3))
    if config.source == "random":
        params = jax.jit(module.init)(jax.random.key(0), image)["params"]
    elif config.source == "clip":
        if not config.weights:
            raise ValueError(
                "this variant distils from CLIP ViT-B/16: say where its weights are with "
                "--config.teacher.weights=ViT-B-16.pt (or .safetensors with its names)"
            )
        template = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
        params = rules.to_flax(open_state_dict(config.weights), CLIP_VISUAL, template)
    else:
        raise ValueError(
            f"teacher.source {config.source!r} is not one of ['shipped', 'clip', 'random', 'none']"
        )
    return Teacher(module, params, CLIP_MEAN, CLIP_STD)
