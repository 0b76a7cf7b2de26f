"""Convert weights: `python -m tokenflow_jax.convert --src=PATH --dst=PATH --to=orbax|torch`.

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

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging

from tokenflow_jax import cli, hub, log, remote, stages


def main(options: flags.FlagValues) -> None:
    cli.require(options, "src", "dst", "to")
    # Orbax logs tracebacks of errors that one line already reports.
    absl_logging.set_verbosity(absl_logging.FATAL)
    log.hush_tensorstore()
    start = time.monotonic()
    if remote.is_remote(dst := options.dst):
        if remote.kind_of(dst) and not options.overwrite:
            raise FileExistsError(f"{dst} exists; give --overwrite to replace it")
        with remote.staged(dst) as local:
            options.dst = str(local)
            written = _convert(options)
    else:
        written = _convert(options)
    print(
        f"wrote {dst}: {written.weights} weights, {written.tensors} arrays, "
        f"{written.nbytes / 1e9:.2f} GB, {time.monotonic() - start:.0f} s"
    )


def define_flags(define: cli.Define) -> None:
    define.string("src", None, "Weights to read.")
    define.string("dst", None, "File or directory to write.")
    define.enum("to", None, ["orbax", "torch"], "Kind of target.")
    define.string("variant", None, "Which model; a PyTorch file does not know, ours does.")
    define.string("part", "tokenizer", f"Which model: {', '.join(stages.STAGES)}.")
    define.string("tokenizer", None, "understanding: the image tokenizer that it reads.")
    define.string("tokenizer_variant", None, "Which model a PyTorch tokenizer is.")
    define.enum("weights", None, ["ema", "raw"], "EMA by default when there is one.")
    define.enum("dtype", None, ["float32", "bfloat16", "float16"], "By default the source's.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.bool("overwrite", False, "Replace what is at --dst.")


def _convert(options: flags.FlagValues) -> Any:
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
    release = hub.release_of(options.src)
    variant = options.variant or (release.variant if release else None)
    config = variants.get(variant)
    how = {name: options[name].value for name in ("weights", "dtype", "step", "overwrite")}
    if understanding:
        from tokenflow_jax.understanding import folder

        return folder.convert(
            options.src,
            options.dst,
            config,
            folder=options.to == "torch" and not is_file,
            tokenizer=_identify(options.tokenizer, options.tokenizer_variant),
            **how,
        )
    if config is None and not conversion.knows_itself(options.src):
        raise ValueError(
            f"{options.src} is a PyTorch checkpoint: say which model it holds, "
            f"--variant=one of {', '.join(variants)}"
        )
    return conversion.convert(options.src, options.dst, part, config, **how)


def _identify(path: str | None, variant: str | None) -> dict[str, str] | None:
    """Return what a checkpoint notes of its image tokenizer."""
    if not path:
        return None
    from tokenflow_jax.tokenizer.fingerprint import fingerprint
    from tokenflow_jax.weights import conversion

    part, config = stages.part("tokenizer"), None
    variant = variant or (release.variant if (release := hub.release_of(path)) else None)
    if variant or not conversion.knows_itself(path):
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
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: an accelerator stays free
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc gives freed arrays back at once; it would keep those of up to 32 MB.
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 256 * 1024)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command in this process."""
    return cli.run("convert", main, define_flags, argv, runtime=False)


def run_alone() -> int:
    """Run the command in its own process."""
    prepare_process()
    return run()


if __name__ == "__main__":
    sys.exit(run_alone())
