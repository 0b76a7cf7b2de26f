"""Estimate the steps of all production recipes on the pods that the docs recommend, without one.

    python -m benchmarks.recipes                        about an hour on two cores
    python -m benchmarks.recipes --only=understanding   those whose line has it

Prints one line of a table per recipe, each compiled by tokenflow_jax.preflight in its own process.
docs/pods.md explains the columns; times are milliseconds.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

_POD, _MACHINE = "v5p:4x4x4", "h100:8"
# What runs, where, and with which settings beside the recipe's own.
RECIPES = (
    ("tokenizer:b", _POD, ()),
    ("tokenizer:b", "v5e:4x4", ()),
    ("tokenizer:l", _POD, ()),
    ("tokenizer:xl", _POD, ("mesh.fsdp=16",)),
    ("generation:7b", _POD, ()),
    ("generation:1b", _POD, ()),
    ("understanding:qwen2_5_14b_pretrain", _POD, ()),
    ("understanding:qwen2_5_14b", _POD, ("pack=1",)),
    ("understanding:qwen2_5_14b", _POD, ()),
    ("understanding:vicuna_13b", _POD, ()),
    ("unified:7b_pretrain", _POD, ()),
    ("unified:7b", _POD, ()),
    ("generation:7b", _MACHINE, ("data.encode=once",)),
    ("understanding:qwen2_5_14b", _MACHINE, ("data.encode=once",)),
)
_COLUMNS = ("arithmetic", "memory", "instructions", "kernels", "waiting", "step")


def estimate(config: str, topology: str, settings: tuple[str, ...]) -> str:
    """Return a recipe's line of the table."""
    command = [sys.executable, "-m", "tokenflow_jax.preflight", f"--config={config}"]
    command += [f"--topology={topology}", *(f"--config.{setting}" for setting in settings)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "figures.json")
        done = subprocess.run([*command, f"--figures={path}"], capture_output=True, text=True)
        if not path.exists():
            return f"| {config} | {topology} | {done.stderr.strip()[-200:]} |"
        found = json.loads(path.read_text(encoding="utf-8"))
    times = [f"{1e3 * found[name]:.0f}" if name in found else "" for name in _COLUMNS]
    use = f"{found['mfu']:.0%}" if "mfu" in found else ""
    memory = f"{found['bytes'] / 2**30:.1f}{'' if found['fits'] else ': does not fit'}"
    took = f"{time.monotonic() - began:.0f} s"
    name = " ".join((config, *settings))
    return "| " + " | ".join((name, topology, *times, use, memory, took)) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="part of a line, such as tokenizer or h100")
    only = parser.parse_args().only
    titles = ("recipe", "topology", *_COLUMNS, "MFU", "GiB per device", "took")
    print("| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", sep="\n")
    for recipe in RECIPES:
        if only in " ".join((*recipe[:2], *recipe[2])):
            print(estimate(*recipe), flush=True)


if __name__ == "__main__":
    main()
