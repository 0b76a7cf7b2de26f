"""Flags of a chip's compiler, from the files that the launch scripts use."""

import os
import pathlib

from tokenflow_jax.parallel.chips import Chip

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "flags"


def compiler_options(chip: Chip) -> dict[str, str] | None:
    """Return the flags for a chip as options of `compile`, without those that the user sets.

    None: there are no files, because the package is installed without launch/.
    """
    if not FOLDER.is_dir():
        return None
    path = FOLDER / (chip.name if chip.tpu else "gpu")
    if os.environ.get("TOKENFLOW_FLAGS") == "off" or not path.exists():
        return {}
    own = os.environ.get("LIBTPU_INIT_ARGS" if chip.tpu else "XLA_FLAGS", "")
    flags = [line for line in path.read_text().splitlines() if line.startswith("--")]
    pairs = (flag.removeprefix("--").split("=", 1) for flag in flags)
    return {name: value for name, value in pairs if f"--{name}=" not in own}


def describe(options: dict[str, str] | None) -> str:
    """Return a line of a report about the flags in use."""
    if options is None:
        return "compiler flags: none, as launch/flags is not installed"
    return "compiler flags: " + (", ".join(map("=".join, options.items())) or "none")
