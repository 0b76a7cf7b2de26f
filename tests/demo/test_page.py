"""The page in headless Chromium, as visitors use it and as they should not.

Needs the extra `demo`, Playwright and a Chromium, which $CHROMIUM or the usual names find.
"""

import io
import os
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from unified.test_stage import make
from unified.test_stage import tiny as tiny_unified

from tokenflow_jax.demo import models
from tokenflow_jax.train import loop

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
from tokenflow_jax.demo import app, codes, parts  # noqa: E402 - they import Gradio

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium"),
]
WAIT = 120_000  # milliseconds, as the first click compiles


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = tiny_unified(str(tiny.write_tokenizer(folder / "tokenizer")))
    config.eval.update(max_new=0, retrieval=0, prompts=())
    loop.train_and_evaluate(config, folder / "unified", make(config))
    page = app.build(models.load([str(folder / "unified")]))
    yield app.launch(page, "127.0.0.1", 0, share=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, address):
    """A visitor's page; it asks nothing of other servers."""
    page, outside = browser.new_page(viewport={"width": 1300, "height": 1100}), []

    def look(request):
        if not request.url.startswith((address, "data:", "blob:")):
            outside.append(request.url)

    page.on("request", look)
    page.goto(address)
    page.wait_for_selector("text=Reconstruction")
    yield page
    page.close()
    assert not outside


def png(size=(40, 40)):
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(buffer := io.BytesIO(), "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def upload(page, place, file):
    page.set_input_files(f"#{place} input[type=file]", file)


def write(page, place, text):
    page.fill(f"#{place} textarea, #{place} input", text)


def emptied(page, place):
    script = "place => !document.querySelector(`#${place} textarea, #${place} input`).value"
    page.wait_for_function(script, arg=place, timeout=WAIT)


def source(page, place):
    """Return the address of the picture that is shown, once there is one."""
    page.wait_for_selector(f"#{place} img", timeout=WAIT)
    return page.locator(f"#{place} img").first.get_attribute("src")


def changed(page, place, before):
    page.wait_for_function(
        "([place, before]) => document.querySelector(`#${place} img`)?.src != before",
        arg=[place, before],
        timeout=WAIT,
    )


def warned(page, words):
    page.wait_for_selector(f".toast-body:has-text('{words}')", timeout=WAIT)


def click(page, name):
    page.locator("button:visible", has_text=name).first.click()


def test_codes_are_shown_by_scale_and_replaced(page):
    upload(page, "picture", png())
    whole, grid = source(page, "reconstruction"), source(page, "code_map")
    page.locator("input[type=range]:visible").first.fill("1")
    changed(page, "reconstruction", whole)
    changed(page, "code_map", grid)
    coarse = source(page, "reconstruction")
    click(page, "Replace")
    warned(page, "click on one of its codes first")
    page.locator("#code_map img").click(position={"x": 100, "y": 100})
    page.wait_for_function(
        "[...document.querySelectorAll('textarea, input')].some(t => t.value.startsWith('code '))",
        timeout=WAIT,
    )
    click(page, "Replace")
    changed(page, "reconstruction", coarse)
    replaced = source(page, "reconstruction")
    click(page, "All codes as they were")
    changed(page, "reconstruction", replaced)


def test_what_is_no_picture_or_too_much_is_told(page):
    upload(page, "picture", {"name": "a.png", "mimeType": "image/png", "buffer": b"some text"})
    warned(page, "a.png")
    upload(page, "picture", png((7200, 7000)))  # 50 megapixels
    source(page, "code_map")
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    warned(page, "type a prompt first")
    write(page, "prompt", "apple " * 1700)
    page.get_by_role("button", name="Draw", exact=True).click()
    warned(page, f"at most {parts.MOST_LETTERS:,} here")


def test_two_visitors_draw_at_once(page, browser, address):
    other = browser.new_page()
    other.goto(address)
    for visitor, prompt in ((page, "red apple"), (other, "dog face")):
        visitor.get_by_role("tab", name="Draw").click()
        write(visitor, "prompt", prompt)
    for visitor in (page, other):
        visitor.get_by_role("button", name="Draw", exact=True).click()
    for visitor in (page, other):
        count = "document.querySelectorAll('#growth img').length >= 3"
        visitor.wait_for_function(count, timeout=WAIT)
    assert source(page, "drawn") != source(other, "drawn")
    other.close()


def test_a_painted_part_is_drawn_anew(page):
    page.get_by_role("tab", name="Draw").click()
    write(page, "prompt", "red apple")
    page.get_by_role("button", name="Draw", exact=True).click()
    source(page, "drawn")
    page.wait_for_function("document.querySelectorAll('#growth img').length >= 3", timeout=WAIT)
    page.get_by_role("tab", name="Edit").click()
    click(page, "Take the drawn picture")
    page.wait_for_timeout(3000)
    write(page, "edit_prompt", "green apple")
    page.get_by_role("button", name="Edit", exact=True).click()
    warned(page, "paint over what is to change first")
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=10)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Edit", exact=True).click()
    assert source(page, "edited")


def test_a_chat_reads_draws_and_starts_over(page):
    page.get_by_role("tab", name="Chat").click()
    upload(page, "asked", png())
    page.wait_for_selector("#asked img")
    write(page, "question", "Which kind of thing is this?")
    click(page, "Ask")
    source(page, "talk")  # the picture is part of the conversation
    page.wait_for_selector("#talk .bot", timeout=WAIT)
    write(page, "question", "red apple")  # stays while the answer grows
    said = ""
    while said != (said := page.locator("#talk").inner_text()):
        page.wait_for_timeout(3000)
    click(page, "Draw this")
    page.wait_for_function("document.querySelectorAll('#talk .bot img').length == 1", timeout=WAIT)
    click(page, "New conversation")
    page.wait_for_function("document.querySelectorAll('#talk img').length == 0", timeout=WAIT)


def test_clicks_while_a_chat_draws_take_their_turn(page):
    page.get_by_role("tab", name="Chat").click()
    write(page, "question", "red apple")
    click(page, "Draw this")
    emptied(page, "question")
    click(page, "New conversation")
    page.wait_for_function("!document.querySelector('#talk .user')", timeout=WAIT)
    write(page, "question", "dog face")
    click(page, "Draw this")
    emptied(page, "question")
    write(page, "question", "What is this?")
    click(page, "Ask")  # at once
    page.wait_for_function("document.querySelectorAll('#talk .bot').length == 2", timeout=WAIT)
    said = ""
    while said != (said := page.locator("#talk").inner_text()):
        page.wait_for_timeout(3000)
    assert "red apple" not in said
    assert said.index("dog face") < said.index("What is this?")
    assert page.locator("#talk .bot img").count() == 1
    page.locator("#talk button[aria-label='Clear']").first.click()
    page.wait_for_function("!document.querySelector('#talk .user')", timeout=WAIT)
    page.wait_for_timeout(2000)
    write(page, "question", "Which kind of thing is this?")
    click(page, "Ask")
    page.wait_for_selector("#talk .bot", timeout=WAIT)
    assert "dog face" not in page.locator("#talk").inner_text()


def test_pictures_of_the_page_are_of_one_size():
    assert codes.enlarged(np.zeros((16, 16, 3), np.uint8)).size == (codes.SIDE, codes.SIDE)
