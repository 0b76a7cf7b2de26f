"""Weights to begin with: of a language model, or of a run that reads, draws, or does both."""

from typing import Any

import jax

from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.generation.names import PART as GENERATION
from tokenflow_jax.train import checkpoint_info
from tokenflow_jax.understanding.names import PART as UNDERSTANDING
from tokenflow_jax.unified.model import UnifiedConfig
from tokenflow_jax.unified.names import PART
from tokenflow_jax.weights import conversion, record, start

PyTree = Any


def load(
    path: str, config: UnifiedConfig, params: PyTree, places: PyTree, tokenizer: dict[str, Any]
) -> tuple[PyTree, str]:
    """Return `params` with the weights of a path, placed alike, and what was taken.

    Raises:
      ValueError: weights of another model, or made with another image tokenizer than `tokenizer`,
        its identity.
    """
    if start.is_language_model(path):
        params, text = start.take_language_model(
            path, config.lm, params, places, config.image_start
        )
        return _without_first_level(params), text
    stage = stage_of(path)
    parts = {part.stage: part for part in (UNDERSTANDING, GENERATION)}
    part = parts.get(stage, PART)
    own = None if conversion.knows_itself(path) else config
    source = conversion.open_source(path, part, own)
    if (known := source.saved.get("tokenizer", {})).get("fingerprint"):
        check_tokenizer(path, known, tokenizer)
    if part is not UNDERSTANDING:
        start.warn_of_options(source.config, path, config)
    if part is PART:
        return start.take(
            source.arrays, path, params, places
        ), f"{source.weights} weights of {path}"
    start.check_language_model(source.config.lm, path, config.lm)
    what = f"{source.weights} weights of the {stage} model {path}"
    if part is GENERATION:
        if source.config.image_start != config.image_start:
            raise ValueError(
                f"{path}: its codes begin at id {source.config.image_start}, here at "
                f"{config.image_start}: give its text tokenizer"
            )
        arrays = _renamed(source.arrays, "write_projector")
        taken = start.take(arrays, path, params, places, fresh=("read_projector",))
        return taken, f"{what}, the reading projector from scratch"
    arrays = _renamed(source.arrays, "read_projector")
    tied = source.config.lm.tied_head
    params, _ = start.take_arrays(arrays, tied, path, params, places, config.image_start)
    text = "codes' rows of the vocabulary, writing projector, levels and positions from scratch"
    return _without_first_level(params), f"{what}, {text}"


def stage_of(path: str) -> str | None:
    """Return the stage whose model a path records that it holds; None if it does not."""
    if conversion.is_torch(path):
        return (record.read_record(path) or {}).get("stage")
    info = checkpoint_info.read_info(checkpoint_info.find_checkpoint(path))
    return info["config"].get("stage")


def _renamed(arrays: dict[str, Any], projector: str) -> dict[str, Any]:
    start = "projector/"
    return {
        f"{projector}/{name.removeprefix(start)}" if name.startswith(start) else name: array
        for name, array in arrays.items()
    }


def _without_first_level(params: PyTree) -> PyTree:
    """Set to zero what is added to text and to what is read: their weights know no such thing."""
    level_SC = params["level_embedding"]
    clear = jax.jit(lambda x: x.at[0].set(0), donate_argnums=0, out_shardings=level_SC.sharding)
    return params | {"level_embedding": clear(level_SC)}
