"""Gather the pictures that train the shipped tokenizer, besides the emoji inside the package.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    apt-get download openclipart-png
    python -m tools.shipped.pictures --src=FOLDER --dst=DIR

DIR gets a folder each: `noto` (Noto Emoji, Apache-2.0), `twemoji` (Twemoji, CC-BY 4.0) and
`openclipart` (public domain). Emoji that the package holds out are left out in all styles, as are
skin tones and flags, and drawings that are nearly empty or there twice.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tokenflow_jax.data.sources import open_source
from tokenflow_jax.log import progress

SIZE = 128  # pixels of a side
_STYLES = {"noto": "google", "twemoji": "twitter"}
# Shapes, gradients and icon themes: thousands that differ in a number or a color.
_LEFT_OUT = re.compile(r"/(shapes|special|flat-theme|lemon-theme|map_symbols|aiga-symbols)/")
_MOST_PIXELS = 2_000_000  # of a drawing; larger ones take seconds each
_LEAST_INK = 0.08  # share of a drawing's pixels that are not white


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path, required=True, help="the three downloaded packages")
    parser.add_argument("--dst", type=Path, required=True)
    options = parser.parse_args()
    held_out = {_bare(example["name"]) for example in open_source("emoji", "", "heldout")}
    for style, vendor in _STYLES.items():
        (options.dst / style).mkdir(parents=True)
        count = write_emoji(_only(options.src, f"emoji-datasource-{vendor}-*.tgz"), vendor,
                            options.dst / style, held_out)  # fmt: skip
        print(f"{style}: {count} pictures")
    (options.dst / "openclipart").mkdir()
    with tempfile.TemporaryDirectory() as folder:
        package = _only(options.src, "openclipart-png_*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        count = write_drawings(Path(folder), options.dst / "openclipart")
    print(f"openclipart: {count} pictures")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} files {pattern}, not one")
    return found[0]


def _bare(name: str) -> str:
    """Return an emoji's code points without the one that only asks for a colored picture."""
    return name.replace("-fe0f", "")


def write_emoji(package: Path, vendor: str, out: Path, held_out: set[str]) -> int:
    """Write a style's emoji, without flags and those held out; return their number."""
    count = 0
    with tarfile.open(package) as tar:
        known = json.load(tar.extractfile("package/emoji.json"))
        for emoji in known:
            name = _bare(emoji["unified"].lower())
            wanted = emoji[f"has_img_{vendor}"] and emoji["category"] != "Flags"
            if wanted and name not in held_out:
                data = tar.extractfile(f"package/img/{vendor}/64/{emoji['image']}").read()
                framed(Image.open(io.BytesIO(data))).save(out / f"{name}.png")
                count += 1
    return count


def write_drawings(folder: Path, out: Path) -> int:
    """Write the drawings that show something, each once; return their number."""
    seen: set[bytes] = set()
    paths = sorted(path for path in folder.rglob("*.png") if path.is_file())
    paths = [path for path in paths if not _LEFT_OUT.search(path.as_posix())]
    for path in progress(paths, len(paths), "drawings"):
        try:
            with Image.open(path) as image:
                if image.width * image.height > _MOST_PIXELS:
                    continue
                made = framed(image)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        ink = (np.asarray(made).min(-1) < 240).mean()
        small = (np.asarray(made.resize((12, 12))) // 32).tobytes()  # the same to the eye
        if ink >= _LEAST_INK and small not in seen:
            seen.add(small)
            made.save(out / f"{path.stem}_{len(seen)}.png")
    return len(seen)


def framed(image: Image.Image) -> Image.Image:
    """Return a picture cropped to what it shows, on a white square with a margin."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image).convert("RGB")
    shown = np.argwhere((np.asarray(image) < 250).any(-1))
    if not len(shown):
        return Image.new("RGB", (SIZE, SIZE), "white")
    (top, left), (bottom, right) = shown.min(0), shown.max(0) + 1
    image = image.crop((left, top, right, bottom))
    side = round(max(image.size) * 1.06)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
