r"""Export a tokenizer to be run without this package, or in a browser without a server.

    python -m tokenflow_jax.export --to=web --out=page --runtime=onnxruntime-web-1.30.0.tgz
                                                   then open page/index.html from disk
    python -m tokenflow_jax.export --to=onnx --checkpoint=runs/quickstart --out=onnx
    python -m tokenflow_jax.export --to=stablehlo --checkpoint=runs/quickstart --out=stablehlo

onnx and stablehlo write encode (pictures to codes), decode (codes to pixels) and features (codes to
what a language model reads), with the weights inside, and tokenizer.json. Programs for StableHLO
take any batch, those for ONNX the one of --batch_size. With onnxruntime the ONNX files are run on
held-out emoji and compared.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from tokenflow_jax import cli, files
from tokenflow_jax.log import log

if TYPE_CHECKING:  # loaded in main, so that --help is quick
    from tokenflow_jax.tokenizer.api import Tokenizer

_SAMPLES = 8
_PACKAGES = {
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnx"),
    "web": ("jax2onnx", "onnx"),
}


def main(options: flags.FlagValues) -> None:
    cli.require(options, "to", "out")
    from tokenflow_jax.export import programs, web
    from tokenflow_jax.tokenizer.api import Tokenizer

    programs.require(*_PACKAGES[options.to])
    runtime = web.read_runtime(options.runtime) if options.to == "web" else {}
    tokenizer = Tokenizer.load(options.checkpoint, options.variant, step=options.step)
    quantizer = tokenizer.config.quantizer
    if options.to == "web" and not quantizer.shared_index:
        raise ValueError(
            f"--to=web shows one code for a cell; this tokenizer has quantizer.kind "
            f"{quantizer.kind!r}, mapping {quantizer.mapping!r} and heads {quantizer.heads}: "
            "take --to=onnx or stablehlo"
        )
    batch = {"stablehlo": None, "onnx": options.batch_size, "web": 1}[options.to]
    about = programs.describe(tokenizer, batch)
    with files.write_atomically(options.out, options.overwrite) as folder:
        folder.mkdir(parents=True)
        start = time.monotonic()
        log.info("two or three programs to convert, up to a minute each")
        if options.to == "web":
            _write_web(folder, tokenizer, about, runtime)
        else:
            _write_programs(folder, tokenizer, about, options)
        log.info("%s: %.0f s", options.out, time.monotonic() - start)
    if options.to == "web":
        print(f"open {files.absolute(options.out) / 'index.html'}")


def _write_programs(
    folder: pathlib.Path, tokenizer: "Tokenizer", about: dict[str, Any], options: flags.FlagValues
) -> None:
    from tokenflow_jax.export import onnx, programs, stablehlo
    from tokenflow_jax.weights.folder import write_json

    for program in programs.programs(tokenizer):
        path = folder / f"{program.name}.{options.to}"
        log.info("converting %s", program.name)
        if options.to == "onnx":
            onnx.write(onnx.convert(program, options.batch_size, about), path)
        else:
            path.write_bytes(stablehlo.convert(program))
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    write_json(folder / "tokenizer.json", about)
    if options.to == "onnx" and options.pictures:
        _check(folder, tokenizer, options.pictures, options.batch_size)


def _write_web(
    folder: pathlib.Path, tokenizer: "Tokenizer", about: dict[str, Any], runtime: dict[str, bytes]
) -> None:
    from tokenflow_jax.export import onnx, programs, web

    models = {}
    for program in programs.programs(tokenizer)[:2]:
        log.info("converting %s", program.name)
        models[program.name] = onnx.convert(program, 1, about).SerializeToString()
    size = web.write(folder, models, runtime, about, _samples())
    weights = sum(map(len, models.values()))
    print(f"{size / 1e6:.1f} MB, of them {weights / 1e6:.1f} MB ONNX before packing")


def _check(folder: pathlib.Path, tokenizer: "Tokenizer", count: int, batch: int) -> None:
    """Print how the exported programs do on held-out emoji."""
    from tokenflow_jax.data.captions.batches import Pictures
    from tokenflow_jax.export import onnx

    if not onnx.can_check():
        print("not checked: onnxruntime is not installed")
        return
    pictures = Pictures(_heldout(tokenizer.config.image_size))
    images = [pictures[i]["image"] for i in range(min(count, len(pictures)))]
    found = onnx.check(folder, tokenizer, images, batch)
    print(
        f"onnxruntime on {found.count} held-out emoji: the codes of {found.equal} equal ours "
        f"({found.codes} codes differ); pixels in [-1, 1] differ by {found.pixels:.1e} at most"
    )


def _samples() -> list[tuple[str, Any]]:
    from tokenflow_jax.data import pipeline

    examples = pipeline.opened(_heldout())
    chosen = range(0, len(examples), len(examples) // _SAMPLES)[:_SAMPLES]
    return [(examples[i]["caption"], examples[i]["image"]) for i in chosen]


def _heldout(image_size: int = 0) -> Any:
    from tokenflow_jax.data import pipeline

    known = {"image_size": image_size} if image_size else {}
    return pipeline.DataConfig("emoji", split="heldout", augment="center", flip=False, **known)


def define_flags(define: cli.Define) -> None:
    define.enum("to", None, ["web", "onnx", "stablehlo"], "What to write.")
    define.string("checkpoint", "emoji", "A tokenizer: a workdir, a checkpoint, or a PyTorch file.")
    define.string("variant", None, "Which model a PyTorch file holds.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.string("out", None, "Folder to write.")
    define.bool("overwrite", False, "Replace what is at --out.")
    define.integer("batch_size", 1, "onnx: pictures at a time.", 1)
    define.integer("pictures", 32, "onnx: held-out emoji to compare; 0 for none.", 0)
    define.string("runtime", None, "web: the npm package onnxruntime-web, a .tgz or its folder.")


def run(argv: Sequence[str] | None = None) -> int:
    return cli.run("export", main, define_flags, argv, runtime=False)


if __name__ == "__main__":
    sys.exit(run())
