"""Train the shipped models again, or go on where a killed run stopped.

    python -m tools.shipped.pictures --src=FOLDER --dst=DIR/pictures
    python -m tools.shipped.make --dir=DIR

It takes over an hour: the runs are in DIR, the models, in float16, in DIR/models, and what they
make of held-out pictures in DIR/shipped.png. `--out=` names another folder for the models, such as
tokenflow_jax/assets/models.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.evals.pictures import labelled_grid, write_png
from tokenflow_jax.tokenizer.api import Tokenizer

SHOWN = 12  # held-out pictures
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
    write_png(picture(tokenizer), options.dir / "shipped.png")
    print(out / "emoji")


def train(config: str, folder: Path, name: str) -> None:
    """Train in `folder/name`, whose neighbors the config names."""
    command = [sys.executable, "-m", "tokenflow_jax.main", f"--config={CONFIGS / config}"]
    if subprocess.run([*command, f"--workdir={name}"], cwd=folder).returncode:
        raise SystemExit(f"{name} failed: the same command goes on")


def picture(tokenizer: Tokenizer) -> np.ndarray:
    """Return held-out emoji, evenly spread, above their reconstructions."""
    size = tokenizer.config.image_size
    held_out = Pictures(DataConfig("emoji", "", "heldout", size, "center", flip=False))
    chosen = np.linspace(0, len(held_out) - 1, SHOWN).astype(int)
    images = np.stack([held_out[i]["image"] for i in chosen.tolist()])
    made = np.stack([np.asarray(one) for one in tokenizer.reconstruct(list(images))])
    return labelled_grid([images, made], ["original", f"from {tokenizer.config.length} codes"])


def in_half(model):
    """Return a model whose weights are float16, which is then what they are saved as."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), model.params)
    return dataclasses.replace(model, params=half)


if __name__ == "__main__":
    main()
