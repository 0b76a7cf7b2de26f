"""A page that runs a tokenizer in a browser, from disk, without a server or a network."""

import base64
import gzip
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

_PAGE = pathlib.Path(__file__).parents[1] / "assets" / "page"
# The WebAssembly build for processors, without WebGPU: half the size of the others.
_SCRIPT = "ort.wasm.min.js"
_GLUE = "ort-wasm-simd-threaded"
_MOST = 100 * 2**20
PACKAGE = "onnxruntime-web@1.30.0"


def read_runtime(path: str | os.PathLike | None) -> dict[str, bytes]:
    """Return the files of onnxruntime-web by name, from its npm package, unpacked or not.

    Raises:
      ValueError: no path, or files that are not there, with the way to get them.
    """
    names = [_SCRIPT, f"{_GLUE}.mjs", f"{_GLUE}.wasm"]
    remedy = f"`npm pack {PACKAGE}` writes onnxruntime-web-1.30.0.tgz, give that to --runtime"
    if not path:
        raise ValueError(f"--to=web needs --runtime, the npm package of the runtime: {remedy}")
    try:
        if os.path.isdir(path):
            folders = [pathlib.Path(path, *below) for below in ((), ("dist",), ("package", "dist"))]
            folder = next((f for f in folders if (f / _SCRIPT).is_file()), folders[0])
            return {name: (folder / name).read_bytes() for name in names}
        with tarfile.open(path) as archive:
            members = [archive.getmember(f"package/dist/{name}") for name in names]
            if any(not m.isfile() or m.size > _MOST for m in members):
                raise KeyError(f"files of at most {_MOST:,} bytes")
            return {n: archive.extractfile(m).read() for n, m in zip(names, members, strict=True)}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"--runtime={path} is not onnxruntime-web ({error}): {remedy}") from None


def write(
    folder: pathlib.Path,
    models: Mapping[str, bytes],
    runtime: Mapping[str, bytes],
    about: Mapping[str, Any],
    samples: Iterable[tuple[str, np.ndarray]],
) -> int:
    """Write the page into a folder and return its size in bytes.

    Args:
      models: encode and decode as ONNX files.
      samples: names and uint8 pictures of any size to start with.
    """
    # What lies beside a page on disk can only be loaded as a script. Packed, the runtime takes a
    # third of its size.
    for path in _PAGE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / _SCRIPT).write_bytes(runtime[_SCRIPT])
    packed = {kind: _packed(runtime[f"{_GLUE}.{kind}"]) for kind in ("mjs", "wasm")}
    (folder / "runtime.js").write_text(f"const RUNTIME = {json.dumps(packed)};\n")
    model = {
        **about,
        **{name: _packed(data) for name, data in models.items()},
        "samples": [{"name": name, "png": _png(image_HWC)} for name, image_HWC in samples],
    }
    size = sum(path.stat().st_size for path in folder.iterdir()) + len(json.dumps(model))
    model["page_bytes"] = size  # but for this number itself
    (folder / "model.js").write_text(f"const MODEL = {json.dumps(model)};\n")
    return size


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def _png(image_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
