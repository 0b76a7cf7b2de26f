"""Load a language model together with the image tokenizer that it was trained on."""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from tokenflow_jax import files, remote, shipped
from tokenflow_jax.data.built_in_text import BUILT_IN
from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.api import Tokenizer, count_parameters
from tokenflow_jax.tokenizer.frozen import check_shared_index
from tokenflow_jax.weights import conversion, quantized, start
from tokenflow_jax.weights.card import Trained
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.pretrained import save_folder
from tokenflow_jax.weights.rules import flatten

_TEXT = "text_tokenizer"  # a subfolder of a saved model
_TEXT_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "config.json",
)  # fmt: skip


class TrainedModel(NamedTuple):
    config: Any  # the model's hyper-parameters
    params: dict
    dtype: str  # of computation and parameters
    tokenizer: Tokenizer
    saved: Mapping[str, Any]  # the training run's whole config, or what else is known
    trained: Trained
    device_mesh: mesh.Mesh | None  # holds the parameters; None if one device has all of them
    model: Any  # the Linen module that runs the parameters


def load_model(
    path: str,
    part: Part,
    module: Callable[[Any, jnp.dtype], Any],
    config: Any = None,
    known: Mapping[str, Any] | None = None,
    *,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    tokenizer_variant: str | None = None,
    weights: str | None = None,
    step: int | None = None,
    dtype: str = "auto",
    weights_dtype: str = "",
) -> TrainedModel:
    """Load a language model, spread over all devices of this process, and its image tokenizer.

    Args:
      part, module: the stage's, from its `names` and `model`.
      config: of the model, if `path` is a PyTorch checkpoint.
      known: "tokenizer" and "data", for a model whose checkpoint holds no training config.
      weights: "ema", "raw", or None for EMA if there is one. For the others see `Generator.load`.
    """
    dtype, path = resolve_dtype(dtype), remote.settled(shipped.resolved(path))
    source = conversion.open_source(path, part, config, weights=weights, step=step)
    saved = source.saved or known or {}
    tokenizer = find_tokenizer(path, saved.get("tokenizer", {}), tokenizer, tokenizer_variant)
    if name := saved.get("text_tokenizer"):
        saved = {**saved, "text_tokenizer": find_text_tokenizer(path, name)}
    trained = Trained.of(path, source)
    device_mesh, held = mesh.answering_mesh(), jnp.dtype(dtype)
    model = quantized.model_of(module(source.config, held), weights_dtype)
    like = quantized.shapes_of(model, held)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: alone, like)
    if device_mesh:
        places = mesh.shardings(like, device_mesh)
    params = start.take(source.arrays, path, like, places)
    return TrainedModel(source.config, params, dtype, tokenizer, saved, trained, device_mesh, model)


def resolve_dtype(name: str) -> str:
    """Turn "auto" into bfloat16 on accelerators and float32 on CPU; check other names."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r}: one of 'auto', 'float32', 'bfloat16'")
    return name


def find_tokenizer(
    model: str,
    known: Mapping[str, Any],  # its "path", "variant" and "fingerprint", as far as noted
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    variant: str | None = None,
) -> Tokenizer:
    """Load the image tokenizer that a model was trained with, and check its fingerprint.

    Without a `tokenizer` it is looked for in the places of `_places`; the first one that fits is
    taken.
    """
    variant = variant or known.get("variant") or None
    if isinstance(tokenizer, Tokenizer):
        return _checked(model, known, tokenizer)
    path = known.get("path") if tokenizer is None else os.fspath(tokenizer)
    problems: list[ValueError] = []
    places = _places(model, "tokenizer", known) if tokenizer is None else [path]
    for place in places:
        if remote.kind_of(place):
            try:
                return _checked(model, known, Tokenizer.load(place, variant))
            except ValueError as error:
                problems.append(error)
    if problems:
        raise problems[0]
    looked = f"; looked for it in {', '.join(map(str, places))}" if tokenizer is None else ""
    if not path:
        raise ValueError(
            f"{model} does not record where the image tokenizer is that it was trained with: "
            f"give its path (--tokenizer=){looked}"
        )
    raise ValueError(
        f"the image tokenizer {path!r} of {model} does not exist; give its path "
        f"(--tokenizer=){looked}"
    )


def _checked(model: str, known: Mapping[str, Any], tokenizer: Tokenizer) -> Tokenizer:
    check_shared_index(tokenizer.config, f"of {model}")
    if known.get("fingerprint"):
        check_tokenizer(model, known, tokenizer.identity)
    return tokenizer


def find_text_tokenizer(model: str, name: str) -> str:
    """Return the folder of a model's text tokenizer where it is now, or a built-in one's name."""
    if name in BUILT_IN:
        return name
    places = _places(model, _TEXT, {"path": name})
    return next((os.fspath(place) for place in places if place.is_dir()), name)


def _places(model: str, inside: str, known: Mapping[str, Any]) -> list[epath.Path]:
    """Return where a checkpoint's tokenizer may be, the likeliest first.

    These are a subfolder of the checkpoint, of its workdir or of a file's folder; the path that was
    recorded; the same from the folders above the workdir, with which it may have moved; and a
    neighbor of the workdir.
    """
    top = files.absolute(model)
    roots = [top if top.is_dir() else top.parent]
    if roots[0].parent.name == "checkpoints":
        roots.append(roots[0].parent.parent)
    places = [root / inside for root in roots]
    workdir, path = roots[-1], known.get("path")
    if path:
        places.append(epath.Path(shipped.resolved(path)))
        if known.get("absolute_path"):
            places.append(epath.Path(known["absolute_path"]))
        if not places[len(roots)].is_absolute():
            places += [folder / path for folder in (workdir, *list(workdir.parents)[:3])]
        places.append(workdir.parent / epath.Path(path).name)
    unique: dict[str, epath.Path] = {}
    for place in places:
        unique.setdefault(os.path.normpath(files.absolute(place)), place)
    return [*unique.values()]


def save_language_model(
    model: Any,
    path: str | os.PathLike,
    part: Part,
    more: Mapping[str, Any],
    text_tokenizer: Any,
    **options: Any,
) -> None:
    """Write a generator or an assistant with both its tokenizers; see `save_folder`."""
    if any(map(quantized.is_quantized, flatten(model.params).values())):
        raise ValueError(
            "this model's weights were quantized when they were loaded: load it without "
            "weights_dtype to save it"
        )
    source = name = getattr(text_tokenizer, "name_or_path", "")
    called = options.get("name") or os.path.basename(os.path.normpath(path))
    parts = {"tokenizer": functools.partial(model.tokenizer.save_pretrained, name=called)}
    if name not in BUILT_IN:
        source = remote.local_copy(source, without=(".safetensors", ".bin"))
        found = [file for file in _TEXT_FILES if os.path.isfile(os.path.join(source, file))]
        if not found:
            raise ValueError(f"the folder {source!r} has no files of the text tokenizer anymore")

        def copy(folder: pathlib.Path) -> None:
            folder.mkdir()
            for file in found:
                shutil.copyfile(os.path.join(source, file), folder / file)

        parts[_TEXT], name = copy, _TEXT
    tokenizer = {"path": "tokenizer", **model.tokenizer.identity}
    more = {"tokenizer": tokenizer, "text_tokenizer": name, **more}
    lm = model.config.lm
    rows = {
        "layers, width": f"{lm.layers}, {lm.width}",
        "vocabulary": lm.vocabulary_size,
        "image tokenizer": f"tokenizer/, fingerprint {tokenizer['fingerprint']}",
        "text tokenizer": name,
    }
    what = (part, model.config, model.params, more, rows, model.trained)
    save_folder(path, *what, parts=parts, **options)


def describe(kind: str, model: Any, text_tokenizer: Any) -> str:
    """Return the repr of a language model."""
    lm, text = model.config.lm, getattr(text_tokenizer, "name_or_path", "?")
    return (
        f"{kind} of {lm.layers} layers of {lm.width}, {count_parameters(model.params):,} "
        f"parameters, {model.dtype}, text tokenizer {text},\n  image tokenizer: {model.tokenizer!r}"
    )
