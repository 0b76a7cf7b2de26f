"""Warm start: replace fresh parameters by those of another model or of a language model."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.log import log
from tokenflow_jax.messages import bullets
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh as meshes
from tokenflow_jax.train import optim
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.formats import gguf
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.language_model import open_language_model, read_config
from tokenflow_jax.weights.lazy import Index, LazyTensor, part_shape, transposed, whole
from tokenflow_jax.weights.lora import is_adapter
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.quantized import is_quantized, quantized
from tokenflow_jax.weights.rules import flatten, unflatten

PyTree = Any
# A language model of other sizes is another model; `remat` and `attention` are a run's choice.
_SAME = (
    "width", "layers", "heads", "kv_heads", "head_channels", "mlp_width", "rope_theta", "norm_eps",
    "qkv_bias",
)  # fmt: skip
# Of all models; no array has another shape where they differ.
_SILENT = (
    "scales", "pixel_weight", "strategy", "rope", "scale_inputs", "image_start", "rope_theta",
    "norm_eps", "norms",
)  # fmt: skip
_VOCABULARY = {"lm/embed/embedding": 0, "lm/head/kernel": 1}  # path -> axis of ids


def take(
    arrays: Mapping[str, Any],
    path: str,
    params: PyTree,
    shardings: PyTree,
    *,
    fresh: tuple[str, ...] = (),
    remedy: str = "",
) -> PyTree:
    """Replace parameters by arrays (lazy or not) of the same paths and shapes, one at a time.

    A process reads what its devices hold, and what is replaced is freed. Adapters stay, and what
    matches a pattern of `fresh`; without these `params` may be shapes. `path` and `remedy` go into
    the error, which lists all arrays that are missing or of another shape.
    """
    ours, places = flatten(params), flatten(shardings)
    kept = flatten(optim.matching(params, fresh)) if fresh else {}
    wanted = {n: array for n, array in ours.items() if not kept.get(n) and not is_adapter(n)}
    check_fit(arrays, path, wanted, remedy)
    for name, array in wanted.items():
        ours[name] = _put(arrays[name], array, places[name])
        _free(array)
    return unflatten(ours)


def _free(array: Any) -> None:
    """Free a replaced parameter now: whoever called still has the whole tree."""
    for part in jax.tree.leaves(array):
        if isinstance(part, jax.Array):
            part.delete()


def _put(array: Any, like: Any, place: Any) -> Any:
    """Put a parameter where `like` is, in its dtype or quantized as it is."""
    if is_quantized(like):
        return jax.tree.map(meshes.place, quantized(array, like), place)
    return meshes.place(array, place, like.dtype)


def check_fit(
    arrays: Mapping[str, Any], path: str, wanted: Mapping[str, Any], remedy: str = ""
) -> None:
    """Raise ValueError that lists every wanted array that is missing or has another shape."""
    wrong = [
        f"{name} is {tuple(arrays[name].shape) if name in arrays else None} there, "
        f"{tuple(array.shape)} here"
        for name, array in wanted.items()
        if name not in arrays or tuple(arrays[name].shape) != tuple(array.shape)
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model{remedy}:\n{bullets(wrong)}")


def load_model(
    path: str, part: Part, config: Any, params: PyTree, shardings: PyTree, lm_ids: int | None = None
) -> tuple[PyTree, str]:
    """Load a language model, or a whole model of the same stage; return also what was taken.

    `path` is a Hugging Face folder or .gguf file; or it holds a model of `part`: a workdir or a
    checkpoint of ours, or a PyTorch checkpoint with the released names. `params` and `shardings`
    are as for `take`, `lm_ids` as `ids` for `take_language_model`.
    """
    if is_language_model(path):
        return take_language_model(path, config.lm, params, shardings, lm_ids)
    own = None if conversion.knows_itself(path) else config
    source = conversion.open_source(path, part, own)
    warn_of_options(source.config, path, config)
    return take(source.arrays, path, params, shardings), f"{source.weights} weights of {path}"


def warn_of_options(source: Any, path: str, config: Any) -> None:
    """Warn of hyper-parameters of no shape that the weights at `path` were trained with otherwise.

    A run may want that, but must not do it unknowingly.
    """
    changed = []
    pairs = [(source, config)] + ([(source.lm, config.lm)] if hasattr(config, "lm") else [])
    for of_source, of_run in pairs:
        changed += [
            f"{name} was {getattr(of_source, name)}, is {getattr(of_run, name)}"
            for name in _SILENT
            if hasattr(of_run, name)
            and hasattr(of_source, name)
            and getattr(of_source, name) != getattr(of_run, name)
        ]
    if changed:
        log.warning("%s was trained with other options: %s", path, "; ".join(changed))


def brought(path: str, params: PyTree, lm_ids: int | None = None) -> PyTree:
    """Mark the parameters that `load_model` replaces wholly; arguments as there."""
    names = [name for name in flatten(params) if not is_adapter(name)]
    if is_language_model(path):
        known = {f"lm/{name}" for name in open_language_model(path)[1]}
        if lm_ids is not None:
            known -= _VOCABULARY.keys()
        names = [name for name in names if name in known]
    return unflatten({name: name in names for name in flatten(params)})


def blanked(params: PyTree, brought: PyTree) -> PyTree:
    """Fill the marked parameters with NaN, so that one that was not replaced is seen at once."""

    def blank(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.full(x.shape, jnp.nan if floating else 0, x.dtype)

    marks = flatten(brought)
    return unflatten(
        {n: jax.tree.map(blank, x) if marks[n] else x for n, x in flatten(params).items()}
    )


def is_language_model(path: str) -> bool:
    """Tell whether a path holds a language model alone, without a projector."""
    if gguf.is_gguf(path):
        return True
    if not conversion.is_torch(path):
        return remote.kind_of(remote.join(path, "config.json")) == "file"
    if conversion.knows_itself(path):
        return False
    try:
        names = open_state_dict(path)
    except ValueError:
        return False  # opening it as a whole model says what is wrong
    return not any("mm_projector." in name for name in names)


def take_language_model(
    path: str, lm: LMConfig, params: PyTree, shardings: PyTree, ids: int | None = None
) -> tuple[PyTree, str]:
    """Replace the parameters under "lm/" by a language model's.

    With `ids` None our vocabulary is the language model's, array by array. Otherwise ids from there
    on are ours alone (codes): their rows stay random, new rows below become the mean of the known
    ones, as in the reference, and arrays that only one of the two has are left alone.
    """
    if not gguf.is_gguf(path):  # its arrays are compared one by one
        check_language_model(read_config(path), path, lm, ("tied_head",) if ids is None else ())
    found, arrays = open_language_model(path)
    arrays = {f"lm/{name}": array for name, array in arrays.items()}
    params, count = take_arrays(arrays, found.tied_head, path, params, shardings, ids)
    if ids is None:
        return params, f"language model {path}, the projector from scratch"
    text = (
        f"language model {path} ({count} of {len(flatten(params))} arrays), the rest from scratch"
    )
    return params, text


def take_arrays(
    arrays: Mapping[str, Any],
    tied_head: bool,  # of the model that they are of
    path: str,
    params: PyTree,
    shardings: PyTree,
    ids: int | None = None,
) -> tuple[PyTree, int]:
    """Replace parameters by a language model's, and others of the same names; count them.

    See `take_language_model`.
    """
    ours, places, arrays = flatten(params), flatten(shardings), dict(arrays)
    if tied_head and ids is not None:
        arrays["lm/head/kernel"] = transposed(arrays["lm/embed/embedding"])
    for name, array in arrays.items():
        if name not in ours and ids is not None:
            continue  # such as the head of a model whose head is tied here
        vocabulary = ids is not None and name in _VOCABULARY
        shape = ours[name].shape if name in ours else None
        if not vocabulary and array.shape != shape:
            raise ValueError(f"{path}: {name} is {array.shape} there, {shape} in config.model.lm")
        if vocabulary:
            taken = extend_vocabulary(ours[name], array, ids, _VOCABULARY[name], places[name])
        else:
            taken = _put(array, ours[name], places[name])
        _free(ours[name])
        ours[name] = taken
    if ids is None:
        own = [name for name in ours if name.startswith("lm/") and not is_adapter(name)]
        if missing := [name for name in own if name not in arrays]:
            raise ValueError(f"{path} lacks what config.model.lm has:\n{bullets(missing)}")
    return unflatten(ours), sum(name in ours for name in arrays)


def check_language_model(
    source: LMConfig, path: str, lm: LMConfig, more: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless a language model has the sizes of `lm`, vocabularies left out."""
    wrong = [
        f"{name} is {getattr(source, name)} there, {getattr(lm, name)} here"
        for name in (*_SAME, *more)
        if getattr(source, name) != getattr(lm, name)
    ]
    if wrong:
        raise ValueError(f"{path} does not fit config.model.lm:\n{bullets(wrong)}")


def extend_vocabulary(
    fresh: jax.Array, known: Any, ids: int, axis: int, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Join a pretrained table's rows, their mean up to `ids`, and fresh rows from there on."""
    rows = min(known.shape[axis], ids)

    def read(index: Index) -> np.ndarray:
        part, inner, place = np.zeros(part_shape(index), known.dtype), [*index], [slice(None)] * 2
        inner[axis] = slice(index[axis].start, min(index[axis].stop, rows))
        place[axis] = slice(0, max(0, inner[axis].stop - inner[axis].start))
        if place[axis].stop:
            part[tuple(place)] = known[tuple(inner)]
        return part

    padded = LazyTensor("", fresh.shape, known.dtype, lambda: read(whole(fresh.shape)), read)

    @functools.partial(jax.jit, out_shardings=sharding)
    def join(fresh: jax.Array, padded: jax.Array) -> jax.Array:
        index = jax.lax.broadcasted_iota(jnp.int32, fresh.shape, axis)
        mean = padded.astype(jnp.float32).sum(axis, keepdims=True) / rows
        joined = jnp.where(index < rows, padded.astype(fresh.dtype), mean.astype(fresh.dtype))
        return jnp.where(index < ids, joined, fresh)

    return join(fresh, meshes.place(padded, sharding))
