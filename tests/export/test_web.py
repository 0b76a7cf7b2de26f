"""The page without a server: its files, and what Chromium makes of it, opened from disk."""

import base64
import gzip
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import tiny
from PIL import Image

import tokenflow_jax as tfx
from tokenflow_jax.data import images, pipeline
from tokenflow_jax.export import onnx, programs, web

RUNTIME = {name: name.encode() for name in (web._SCRIPT, f"{web._GLUE}.mjs", f"{web._GLUE}.wasm")}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
PACKAGE = "TOKENFLOW_ONNXRUNTIME_WEB"  # the npm package for the test in Chromium


def value_of(path):
    """Return what a script assigns to its one constant."""
    return json.loads(path.read_text().split(" = ", 1)[1].rstrip(";\n"))


def test_the_runtime_is_read_packed_and_unpacked(tmp_path):
    folder = tmp_path / "package" / "dist"
    folder.mkdir(parents=True)
    for name, data in RUNTIME.items():
        (folder / name).write_bytes(data)
    with tarfile.open(tmp_path / "runtime.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    for path in ("runtime.tgz", ".", "package", "package/dist"):
        assert web.read_runtime(tmp_path / path) == RUNTIME


def test_everything_is_in_scripts_beside_the_page(tmp_path):
    models = {"encode": b"encoder", "decode": b"decoder"}
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    size = web.write(tmp_path, models, RUNTIME, {"image_size": 4}, [("</script>", picture)])
    model = value_of(tmp_path / "model.js")
    for name, data in models.items():
        assert gzip.decompress(base64.b64decode(model[name])) == data
    wasm = value_of(tmp_path / "runtime.js")["wasm"]
    assert gzip.decompress(base64.b64decode(wasm)) == RUNTIME[f"{web._GLUE}.wasm"]
    png = io.BytesIO(base64.b64decode(model["samples"][0]["png"]))
    assert np.array_equal(np.asarray(Image.open(png)), picture)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert model["page_bytes"] == size and abs(written - size) < 100
    page = (tmp_path / "index.html").read_text()
    for script in ("ort.wasm.min.js", "runtime.js", "model.js", "picture.js", "page.js"):
        assert f'src="{script}"' in page and (tmp_path / script).is_file()
    assert "http" not in page


RUN = """async ([png, codes]) => {
  const blob = await (await fetch(`data:image/png;base64,${png}`)).blob();
  const picture = fit(await readPicture(blob), SIDE);
  const found = Array.from(await encode(picture));
  return [Array.from(picture), found, Array.from(await decode(Int32Array.from(codes)))];
}"""


@pytest.fixture(scope="module")
def tokenizer():
    return tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 0))


@pytest.fixture(scope="module")
def chromium(tokenizer, tmp_path_factory):
    """The page of a tokenizer in Chromium, without a network."""
    sync = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("jax2onnx")
    if not CHROMIUM or PACKAGE not in os.environ:
        pytest.skip(f"needs chromium, and `npm pack {web.PACKAGE}` in ${PACKAGE}")
    folder = tmp_path_factory.mktemp("page")
    about = programs.describe(tokenizer, 1)
    models = {
        program.name: onnx.convert(program, 1, about).SerializeToString()
        for program in programs.programs(tokenizer)[:2]
    }
    samples = [("sample", np.full((40, 40, 3), 200, np.uint8))]
    web.write(folder, models, web.read_runtime(os.environ[PACKAGE]), about, samples)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True).new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(error))
        page.on("request", lambda r: r.url.startswith("http") and page.faults.append(r.url))
        page.goto((folder / "index.html").as_uri())
        page.evaluate("started")
        page.wait_for_function("at('status').textContent.startsWith('Encoded')", timeout=120_000)
        yield page
        browser.close()


def as_png(image_HWC):
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_codes_and_pixels_of_all_heldout_emoji(chromium, tokenizer):
    size = tokenizer.config.image_size
    examples = pipeline.opened(pipeline.DataConfig("emoji", split="heldout", augment="center"))
    assert len(examples) == 158
    large = [examples[i]["image"] for i in range(158)]
    images_BHWC = np.stack([images.center_crop(image_HWC, size) for image_HWC in large])
    codes_BL = np.asarray(tokenizer.encode(images_BHWC))
    pixels_BHWC = np.asarray(tokenizer.decode(codes_BL))
    for i, image_HWC in enumerate(large):
        png = base64.b64encode(as_png(image_HWC)).decode()
        picture, codes, pixels = chromium.evaluate(RUN, [png, codes_BL[i].tolist()])
        assert np.array_equal(np.reshape(picture, images_BHWC[i].shape), images_BHWC[i])
        assert codes == codes_BL[i].tolist()
        assert abs(np.reshape(pixels, pixels_BHWC[i].shape) - pixels_BHWC[i]).max() < 1e-4
    assert not chromium.faults


@pytest.mark.slow
@pytest.mark.parametrize("side", [15, 17, 33, 63, 130])
def test_pictures_are_resized_as_in_training(chromium, side):
    image_HWC = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    run = "([pixels, side]) => Array.from(fit({pixels, width: side, height: side}, SIDE))"
    found = chromium.evaluate(run, [image_HWC.reshape(-1).tolist(), side])
    assert found == images.center_crop(image_HWC, 16).reshape(-1).tolist()


@pytest.mark.slow
def test_a_visitor_s_clicks(chromium):
    upload = {"name": "a.png", "mimeType": "image/png"}
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    chromium.set_input_files("#file", {**upload, "buffer": as_png(noise)})
    chromium.wait_for_function("at('quality').textContent.startsWith('Drawn from 21 codes')")
    chromium.evaluate("at('scales').value = 1; at('scales').dispatchEvent(new Event('input'))")
    chromium.wait_for_function("at('quality').textContent.startsWith('Drawn from 1 codes')")
    chromium.click("button[aria-label='scale 3, row 2, column 4']")
    chromium.wait_for_function("at('count').textContent === '3 of 3'")
    old = int(chromium.input_value("#code"))
    chromium.fill("#code", str((old + 1) % 32))
    chromium.press("#code", "Enter")
    chromium.wait_for_function("at('changed').textContent.startsWith('What 1 changed code did')")
    chromium.fill("#code", "32")
    chromium.press("#code", "Enter")
    assert chromium.text_content("#status") == "Codes are 0 to 31."
    chromium.click("#undo")
    chromium.wait_for_function("at('changed').textContent.endsWith('appears here')")
    chromium.set_input_files("#file", {**upload, "buffer": b"text"})
    chromium.wait_for_function("at('status').textContent.startsWith('a.png cannot be used')")
    assert not chromium.faults
