"""ONNX, through jax2onnx: programs of a fixed batch, and the check of what onnxruntime makes."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np

from tokenflow_jax.export.programs import Program, as_text
from tokenflow_jax.parallel import nearest_kernel

_LARGE = 2**31 - 2**24  # bytes of weights: protobuf takes files below 2 GB


def convert(program: Program, batch: int, about: Mapping[str, Any]) -> Any:
    """Return a program as an `onnx.ModelProto`; `about` is its metadata."""
    # They warn of shapes without a type, and of examples whose packages are not installed.
    for name in ("onnx_ir", "jax2onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import jax2onnx

    spec = program.spec(batch)
    # Traced beforehand: jax2onnx replaces functions of jax by its own, which break Flax's scan.
    with _without_kernel():
        traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(program.function)(spec))
    model = jax2onnx.to_onnx(
        lambda array: traced(array)[0],
        [spec],
        model_name=program.name,
        input_names=[program.input],
        output_names=[program.output],
    )
    _clean(model)
    for key, text in as_text(about).items():
        model.metadata_props.add(key=key, value=text)
    return model


@contextlib.contextmanager
def _without_kernel() -> Iterator[None]:
    """Search codes in the plain form: ONNX has no branch for TPUs."""
    before = os.environ.get(nearest_kernel.VARIABLE)
    os.environ[nearest_kernel.VARIABLE] = "never"
    try:
        yield
    finally:
        del os.environ[nearest_kernel.VARIABLE]
        if before is not None:
            os.environ[nearest_kernel.VARIABLE] = before


def _clean(model: Any) -> None:
    """Drop unused constants; keep as float16 what is exactly that, cast where the program starts.

    Weights that were saved in float16 take half the space so, and no code changes.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for i, tensor in enumerate(kept):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < 256:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            kept[i] = numpy_helper.from_array(half, f"{tensor.name}_half")
            casts.append(helper.make_node("Cast", [kept[i].name], [tensor.name], to=1))
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def write(model: Any, path: str | os.PathLike) -> None:
    """Write a model, above 2 GB with its weights in a second file."""
    import onnx

    path = os.fspath(path)
    apart = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGE
    onnx.save_model(
        model, path, save_as_external_data=apart, location=f"{os.path.basename(path)}.data"
    )


def can_check() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


class Checked(NamedTuple):
    equal: int  # pictures whose codes are all ours
    count: int
    codes: int  # codes that are not ours
    pixels: float  # largest difference, of pixels in [-1, 1]


def check(
    folder: str | os.PathLike, tokenizer: Any, images: Sequence[np.ndarray], batch: int
) -> Checked:
    """Run encode.onnx and decode.onnx of a folder on pictures and compare with the tokenizer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(os.path.join(folder, f"{name}.onnx"), options)
        for name in ("encode", "decode")
    ]
    count = len(images) // batch * batch
    wrong, equal, largest = 0, 0, 0.0
    for start in range(0, count, batch):
        images_BHWC = np.stack(images[start : start + batch])
        codes_BL = np.asarray(tokenizer.encode(images_BHWC))
        (found_BL,) = sessions[0].run(None, {"images": images_BHWC})
        (pixels_BHWC,) = sessions[1].run(None, {"codes": codes_BL})
        wrong += int((found_BL != codes_BL).sum())
        equal += int((found_BL == codes_BL).all(1).sum())
        largest = max(largest, float(abs(pixels_BHWC - tokenizer.decode(codes_BL)).max()))
    return Checked(equal, count, wrong, largest)
