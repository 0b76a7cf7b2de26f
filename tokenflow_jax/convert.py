"""Converts weights: `python -m tokenflow_jax.convert --src=PATH --dst=PATH --to=orbax|torch`.

    --src=tokenflow.pt --dst=weights/b --to=orbax --variant=b     PyTorch to JAX
    --src=weights/b --dst=tokenflow.safetensors --to=torch        and back, bit for bit
    --src=runs/tokenizer --dst=mine.pt --to=torch                 a training run for PyTorch

A source is a PyTorch checkpoint (.pt, .pth, .bin, .safetensors; also an index or a folder of
shards), a training workdir, one of its checkpoints, or a directory that this program wrote. The
target's form follows its ending: .safetensors; .pt, which then holds {"model": state_dict};
anything else becomes a directory for Tokenizer.load and --config.init_from. With
--part=understanding and --to=torch it may also be a folder, which gets the released layout:
config.json and sharded .safetensors. As a source such a folder needs no --variant. --tokenizer says
which image tokenizer the model reads: a directory notes its fingerprint, others are refused then.

One set of weights is written: the moving average (EMA) when the source has one, else the raw
weights. torch is not needed, and nothing that is pickled in a file is ever executed. Memory holds
one array at a time, and nothing appears under its final name before it is complete.
"""

import argparse
import ctypes
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging as absl_logging

from tokenflow_jax import log as runlog


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenflow_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--src", required=True, help="weights to read")
    parser.add_argument("--dst", required=True, help="file or directory to write")
    parser.add_argument("--to", required=True, choices=("orbax", "torch"), help="kind of target")
    parser.add_argument("--variant", help="which model; a PyTorch file does not know, ours does")
    parser.add_argument("--part", default="tokenizer", help="which model of TokenFlow")
    parser.add_argument("--tokenizer", help="of --part=understanding: what it reads, to be noted")
    parser.add_argument("--tokenizer_variant", help="which model a PyTorch tokenizer is")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: EMA when there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters; default: as in the source",
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; default: newest")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --dst")
    options = parser.parse_args(argv)
    runlog.hush_tensorstore()
    try:
        _convert(options)
    except (OSError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _convert(options: argparse.Namespace) -> None:
    """Checks the flags, converts, and says what was written."""
    is_file = options.dst.endswith((".pt", ".safetensors"))
    torch_target = is_file or (options.part == "understanding" and options.to == "torch")
    if torch_target != (options.to == "torch"):
        raise ValueError(
            f"--to={options.to} does not go with --dst={options.dst}: a file that ends in .pt or "
            ".safetensors is for torch, a directory for orbax"
        )
    from tokenflow_jax import stages as parts  # here, so that --help is quick
    from tokenflow_jax.weights import conversion

    if options.part not in parts.PARTS:
        raise ValueError(f"--part={options.part}: one of {', '.join(parts.PARTS)}")
    part = parts.PARTS[options.part]
    if options.variant is not None and options.variant not in part.variants:
        raise ValueError(f"--variant={options.variant}: one of {', '.join(part.variants)}")
    if options.tokenizer and (options.part != "understanding" or is_file):
        raise ValueError(
            f"--tokenizer goes with --part=understanding and a directory, not with "
            f"--part={options.part} and --dst={options.dst}: nothing there can note it"
        )
    if options.part == "understanding":
        _convert_understanding(options, part)
        return
    if options.variant is None and conversion.is_torch(options.src):
        raise ValueError(
            f"{options.src} is a PyTorch checkpoint: say which model it holds, "
            f"--variant=one of {', '.join(part.variants)}"
        )
    start = time.monotonic()
    written = conversion.convert(
        options.src,
        options.dst,
        part.variants[options.variant] if options.variant else None,
        part=part,
        weights=options.weights,
        dtype=options.dtype,
        step=options.step,
        overwrite=options.overwrite,
    )
    _report(options.dst, written, start)


def _convert_understanding(options: argparse.Namespace, part: Any) -> None:
    """The same for a model that goes with a tokenizer, and may lie in a folder."""
    from tokenflow_jax.understanding import folder as understanding_folder

    start = time.monotonic()
    written = understanding_folder.convert(
        options.src,
        options.dst,
        part,
        config=part.variants[options.variant] if options.variant else None,
        folder=options.to == "torch" and not options.dst.endswith((".pt", ".safetensors")),
        dtype=options.dtype,
        step=options.step,
        overwrite=options.overwrite,
        tokenizer=_identify(options.tokenizer, options.tokenizer_variant),
    )
    _report(options.dst, written, start)


def _identify(path: str | None, variant: str | None) -> dict[str, str] | None:
    """What is noted of an image tokenizer."""
    if not path:
        return None
    from tokenflow_jax.tokenizer.fingerprint import fingerprint
    from tokenflow_jax.tokenizer.model import VARIANTS
    from tokenflow_jax.weights import conversion

    config = None
    if conversion.is_torch(path):
        if variant not in VARIANTS:
            raise ValueError(
                f"{path} is a PyTorch checkpoint: say which model it holds, "
                f"--tokenizer_variant=one of {', '.join(VARIANTS)}"
            )
        config = VARIANTS[variant]
    source = conversion.open_source(path, config)
    found = fingerprint(source.config, source.arrays)
    return {"path": path, "variant": variant or "", "fingerprint": found}


def _report(dst: str, written: Any, start: float) -> None:
    print(
        f"wrote {dst}: {written.weights} weights, {written.tensors} arrays, "
        f"{written.nbytes / 1e9:.2f} GB, {time.monotonic() - start:.0f} s"
    )


def prepare_process() -> None:
    """Settings of a process that does nothing else."""
    # Orbax logs tracebacks of errors that are told in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: an accelerator stays free
    _return_freed_memory()


def _return_freed_memory() -> None:
    """Tells glibc to give freed arrays back at once; it would keep those of up to 32 MB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 256 * 1024)


def run() -> int:
    """Run the command in a process of its own."""
    prepare_process()
    return main()


if __name__ == "__main__":
    sys.exit(run())
