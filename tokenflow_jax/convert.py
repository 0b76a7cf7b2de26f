"""Converts weights: `python -m tokenflow_jax.convert --src=PATH --dst=PATH --to=orbax|torch`.

    --src=tokenflow.pt --dst=weights/b --to=orbax --variant=b     PyTorch to JAX
    --src=weights/b --dst=tokenflow.safetensors --to=torch        and back, bit for bit
    --src=runs/tokenizer --dst=mine.pt --to=torch                 a training run for PyTorch

A source is a PyTorch checkpoint (.pt, .pth, .bin, .safetensors; also an index or a folder of
shards), a training workdir, one of its checkpoints, or a directory that this program wrote. The
target's form follows its ending: .safetensors; .pt, which then holds {"model": state_dict};
anything else becomes a directory for Tokenizer.load and --config.init_from. With
--part=understanding and --to=torch it may also be a folder, which gets the released layout:
config.json and sharded .safetensors. As a source such a folder needs no --variant. --tokenizer
names the image tokenizer that the model reads: a directory notes its fingerprint, and others are
refused then.

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
from tokenflow_jax import stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenflow_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, dtypes = parser.add_argument, ("float32", "bfloat16", "float16")
    add("--src", required=True, help="weights to read")
    add("--dst", required=True, help="file or directory to write")
    add("--to", required=True, choices=("orbax", "torch"), help="kind of target")
    add("--variant", help="which model; a PyTorch file does not know, ours does")
    add("--part", default="tokenizer", help=f"which model: {', '.join(stages.STAGES)}")
    add("--tokenizer", help="of --part=understanding: the image tokenizer that it reads")
    add("--tokenizer_variant", help="which model a PyTorch tokenizer is")
    add("--weights", choices=("ema", "raw"), help="default: EMA when there is one")
    add("--dtype", choices=dtypes, help="of the parameters; default: as in the source")
    add("--step", type=int, help="which checkpoint of a workdir; default: newest")
    add("--overwrite", action="store_true", help="replace what is at --dst")
    options = parser.parse_args(argv)
    runlog.hush_tensorstore()
    start = time.monotonic()
    try:
        written = _convert(options)
    except (OSError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr, flush=True)
        return 2
    print(
        f"wrote {options.dst}: {written.weights} weights, {written.tensors} arrays, "
        f"{written.nbytes / 1e9:.2f} GB, {time.monotonic() - start:.0f} s"
    )
    return 0


def _convert(options: argparse.Namespace) -> Any:
    """Check the flags and convert."""
    from tokenflow_jax.weights import conversion  # here, so that --help is quick

    understanding = options.part == "understanding"
    is_file = options.dst.endswith(conversion.TORCH_FILES)
    if (is_file or (understanding and options.to == "torch")) != (options.to == "torch"):
        raise ValueError(
            f"--to={options.to} does not go with --dst={options.dst}: a file that ends in .pt or "
            ".safetensors is for torch, a directory for orbax"
        )
    if options.part not in stages.STAGES:
        raise ValueError(f"--part={options.part}: one of {', '.join(stages.STAGES)}")
    part = stages.part(options.part)
    variants = part.variants
    if options.variant is not None and options.variant not in variants:
        raise ValueError(f"--variant={options.variant}: one of {', '.join(variants)}")
    if options.tokenizer and (is_file or not understanding):
        raise ValueError(
            f"--tokenizer goes with --part=understanding and a directory, not with "
            f"--part={options.part} and --dst={options.dst}: nothing there can note it"
        )
    config = variants[options.variant] if options.variant else None
    flags = {name: getattr(options, name) for name in ("weights", "dtype", "step", "overwrite")}
    if understanding:
        from tokenflow_jax.understanding import folder

        return folder.convert(
            options.src,
            options.dst,
            config,
            folder=options.to == "torch" and not is_file,
            tokenizer=_identify(options.tokenizer, options.tokenizer_variant),
            **flags,
        )
    if config is None and conversion.is_torch(options.src):
        raise ValueError(
            f"{options.src} is a PyTorch checkpoint: say which model it holds, "
            f"--variant=one of {', '.join(variants)}"
        )
    return conversion.convert(options.src, options.dst, part, config, **flags)


def _identify(path: str | None, variant: str | None) -> dict[str, str] | None:
    """Return what a checkpoint notes of its image tokenizer."""
    if not path:
        return None
    from tokenflow_jax.tokenizer.fingerprint import fingerprint
    from tokenflow_jax.weights import conversion

    part, config = stages.part("tokenizer"), None
    if conversion.is_torch(path):
        if variant not in part.variants:
            raise ValueError(
                f"{path} is a PyTorch checkpoint: say which model it holds, "
                f"--tokenizer_variant=one of {', '.join(part.variants)}"
            )
        config = part.variants[variant]
    source = conversion.open_source(path, part, config)
    found = fingerprint(source.config, source.arrays)
    return {"path": path, "variant": variant or "", "fingerprint": found}


def prepare_process() -> None:
    """Set up a process that does nothing but convert."""
    # Orbax logs tracebacks of errors that one line already reports.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: an accelerator stays free
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc gives freed arrays back at once; it would keep those of up to 32 MB.
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 256 * 1024)


def run() -> int:
    """Run the command in a process of its own."""
    prepare_process()
    return main()


if __name__ == "__main__":
    sys.exit(run())
