"""Decoders whose linear layers hold few bits per weight, through qwix.

int8 has one scale per output channel, int4 and nf4 (QLoRA's 4-bit floats) one per tile of inputs,
too. Layers turn their kernels back into the dtype of the computation when they use them, so a
quantized model computes what its dequantized weights would. qwix puts a kernel's integers and
scales where the kernel was: one leaf of a flattened tree, whose arrays are
`.../kernel/array/qvalue` and `.../kernel/array/scale`.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.weights.lazy import Index, LazyTensor, whole

PyTree = Any
KINDS = ("int8", "int4", "nf4")
LAYERS = "lm/blocks"
LINEAR = ("attention/q", "attention/k", "attention/v", "attention/out", "mlp/gate", "mlp/up",
          "mlp/down")  # fmt: skip
ARRAYS = ("array/qvalue", "array/scale")  # of a quantized kernel
_TILE = 64  # inputs that share a scale, as in QLoRA (arXiv 2305.14314)


def import_qwix() -> Any:
    """Return the module; ValueError says how to install it."""
    try:
        import qwix
    except ImportError:
        raise ValueError(
            "LoRA and quantized weights need qwix: pip install 'tokenflow_jax[lora]'"
        ) from None
    return qwix


def settings(lm: LMConfig, layer: str, kind: str) -> dict[str, Any]:
    """Return the fields of a qwix rule for one of LINEAR; kind "" leaves it as it is."""
    path = {"module_path": re.escape(f"{LAYERS}/{layer}")}
    if not kind:
        return path
    inputs = {"attention/out": lm.heads * lm.head_channels, "mlp/down": lm.mlp_width}
    tile = math.gcd(_TILE, inputs.get(layer, lm.width)) if kind != "int8" else None
    return {**path, "weight_qtype": kind, "tile_size": tile}


def model_of(model: Any, kind: str) -> Any:
    """Return a model that takes a plain one's parameters with kernels of a kind; "" are floats."""
    if not kind:
        return model
    if kind not in KINDS:
        raise ValueError(f"weights_dtype {kind!r}: one of {', '.join(KINDS)}, or none")
    qwix = import_qwix()
    rules = [qwix.QuantizationRule(**settings(model.config.lm, n, kind)) for n in LINEAR]
    return qwix.quantize_model(model, qwix.PtqProvider(rules), methods=model.runs_decoder)


def shapes_of(model: Any, dtype: jnp.dtype) -> PyTree:
    """Return the shapes of a model's parameters, floats in `dtype`."""
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))

    def leaf(x: Any) -> Any:
        own = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, own)

    return jax.tree.map(leaf, shapes)


def is_quantized(leaf: Any) -> bool:
    """Tell a leaf of a flattened tree that is a quantized kernel."""
    return hasattr(leaf, "how")


def stored(leaf: Any) -> Any:
    """Return a quantized kernel as checkpoints hold it: TensorStore has int4, but no uint4."""
    return _cast(leaf, jnp.uint4, jnp.int4)


def used(leaf: Any) -> Any:
    """Return a quantized kernel as qwix takes it, from what `stored` made of it."""
    return _cast(leaf, jnp.int4, jnp.uint4) if leaf.array.qtype == "nf4" else leaf


def _cast(leaf: Any, old: Any, new: Any) -> Any:
    qvalue = leaf.array.qvalue
    if qvalue.dtype != old:
        return leaf
    if isinstance(qvalue, np.ndarray):
        qvalue = qvalue.view(new)
    else:
        qvalue = jax.lax.bitcast_convert_type(qvalue, new)
    return leaf.replace(array=leaf.array.replace(qvalue=qvalue))


def quantized(array: Any, like: Any) -> Any:
    """Return a kernel (L, in, out) quantized as `like` is, whose arrays are read in parts.

    `array` gives a part for an index. Layers are quantized one by one, where they are read, with
    all inputs: an output channel has its own scales.
    """
    how = like.how
    tiles = tuple(how.tiled_axes.items())
    run = _quantizer(how.qtype, tuple(how.channelwise_axes), tiles, jnp.dtype(like.dtype))
    inputs = slice(0, array.shape[1])
    scales: dict[str, np.ndarray] = {}  # made beside the integers, which are read first

    def layer(number: int, outputs: slice) -> tuple[np.ndarray, np.ndarray]:
        kernel = array[slice(number, number + 1), inputs, outputs][0]
        # One layer: qwix.quantize_params would take the axis of the layers for the inputs.
        found = jax.tree.map(np.asarray, run(jnp.asarray(kernel, jnp.float32)))
        leaf = like.replace(array=found)
        leaf = stored(leaf) if like.array.qvalue.dtype == jnp.int4 else leaf
        return leaf.array.qvalue, leaf.array.scale

    def values_of(index: Index) -> np.ndarray:
        numbers, values, own = range(index[0].start, index[0].stop), [], []
        for number in numbers:
            value, scale = layer(number, index[2])
            values.append(value[index[1]])
            own.append(scale)
        scales[str((index[0], index[2]))] = np.stack(own)
        return np.stack(values)

    def scales_of(index: Index) -> np.ndarray:
        key = str((index[0], index[2]))
        if key not in scales:
            values_of((index[0], slice(0, 0), index[2]))
        return scales[key][:, index[1]]

    def lazy(read: Callable[[Index], np.ndarray], kept: Any) -> LazyTensor:
        return LazyTensor("", kept.shape, kept.dtype, lambda: read(whole(kept.shape)), read)

    qvalue, scale = lazy(values_of, like.array.qvalue), lazy(scales_of, like.array.scale)
    return like.replace(array=like.array.replace(qvalue=qvalue, scale=scale))


@functools.cache
def _quantizer(kind: str, channels: tuple, tiles: tuple, dtype: jnp.dtype) -> Any:
    options = {"channelwise_axes": channels, "tiled_axes": dict(tiles), "scale_dtype": dtype}
    return jax.jit(functools.partial(import_qwix().quantize, qtype=kind, **options))


def dequantize(qvalue: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    """Return the float32 kernels (L, in, out) that a quantized one stands for."""
    qwix = import_qwix()

    def layer(qvalue: np.ndarray, scale: np.ndarray) -> np.ndarray:
        if kind == "nf4":
            qvalue = qvalue.view(jnp.uint4)
        array = qwix.QArray(jnp.asarray(qvalue), jnp.asarray(scale), None, kind)
        return np.asarray(qwix.dequantize(array), np.float32)

    return np.stack([layer(*pair) for pair in zip(qvalue, scale, strict=True)])
