"""Train the shipped models again, or go on where a killed run stopped.

    python -m tools.shipped.pictures --src=FOLDER --dst=DIR/pictures
    python -m tools.shipped.make --dir=DIR

Hours on two cores: the runs are in DIR, the models, in float16, in DIR/models. `--out=` names
another folder for these, such as tokenflow_jax/assets/models.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from tokenflow_jax.tokenizer.api import Tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


def main() -> None:
    """Train what is not trained yet, and write the models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="has the folder pictures")
    parser.add_argument("--out", type=Path, help="default: DIR/models")
    options = parser.parse_args()
    train("tokenizer.py:emoji", options.dir, "tokenizer")
    tokenizer = in_half(Tokenizer.load(options.dir / "tokenizer"))
    out = options.out or options.dir / "models"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "emoji", name="emoji", overwrite=True)
    print(out / "emoji")


def train(config: str, folder: Path, name: str) -> None:
    """Train in `folder/name`, whose neighbors the config names."""
    command = [sys.executable, "-m", "tokenflow_jax.main", f"--config={CONFIGS / config}"]
    if subprocess.run([*command, f"--workdir={name}"], cwd=folder).returncode:
        raise SystemExit(f"{name} failed: the same command goes on")


def in_half(model):
    """Return a model whose weights are float16, which is then what they are saved as."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), model.params)
    return dataclasses.replace(model, params=half)


if __name__ == "__main__":
    main()
