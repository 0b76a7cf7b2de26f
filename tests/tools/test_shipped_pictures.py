"""The pictures of the shipped tokenizer: what is held out, empty or there twice stays out."""

import io
import json
import tarfile

import numpy as np
from PIL import Image, ImageDraw

from tools.shipped import pictures


def drawing(color, shift=0, size=64):
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    box = (size // 4 + shift, size // 4, size // 2 + shift, size // 2)
    ImageDraw.Draw(image).ellipse(box, color)
    return image


def test_emoji_that_are_held_out_stay_out_in_every_spelling(tmp_path):
    known = [("1F34E", "Food"), ("26F9-FE0F-200D-2642-FE0F", "People"), ("1F1E6", "Flags"),
             ("2764-FE0F", "Symbols"), ("1F4A9", "Symbols")]  # fmt: skip
    entries = [
        {"unified": name, "category": category, "image": f"{name.lower()}.png",
         "has_img_google": name != "1F4A9"}
        for name, category in known
    ]  # fmt: skip
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for entry in entries:
            drawing("red").save(data := io.BytesIO(), "PNG")
            files[f"package/img/google/64/{entry['image']}"] = data.getvalue()
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (out := tmp_path / "out").mkdir()
    held_out = {"26f9-200d-2642", "2764"}
    assert pictures.write_emoji(tmp_path / "package.tgz", "google", out, held_out) == 1
    assert [path.name for path in out.iterdir()] == ["1f34e.png"]


def test_drawings_are_cropped_to_what_they_show_and_there_once(tmp_path):
    (source := tmp_path / "clip" / "animals").mkdir(parents=True)
    (left_out := tmp_path / "clip" / "shapes" / "stars").mkdir(parents=True)
    (out := tmp_path / "out").mkdir()
    drawing("red").save(source / "a.png")
    drawing("red", shift=9).save(source / "b.png")  # the same, elsewhere
    drawing("blue").save(source / "c.png")
    drawing("green").save(left_out / "d.png")
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(source / "empty.png")
    (source / "broken.png").write_bytes(b"no picture")
    assert pictures.write_drawings(tmp_path / "clip", out) == 2
    for path in out.iterdir():
        found = np.argwhere((np.asarray(Image.open(path)) < 250).any(-1))
        assert found.min() < 8 and found.max() >= pictures.SIZE - 8
