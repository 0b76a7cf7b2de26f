"""What the tabs of the page share: pictures, limits, and how mistakes are shown."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np

from tokenflow_jax.data.pictures import read_picture
from tokenflow_jax.demo import codes
from tokenflow_jax.log import log

MOST_LETTERS = 1000  # of a prompt or a question


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a visitor's mistake as one line and change nothing; log what is our fault."""
    generates = function.__code__.co_flags & 0x20  # a generator function

    def tell(error: Exception) -> Any:
        if isinstance(error, ValueError | OSError):
            gr.Warning(str(error))
            return gr.skip()
        log.error("the page: %s", error, exc_info=error)
        raise gr.Error("something went wrong here; the terminal says what", print_exception=False)

    @functools.wraps(function)
    def once(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            return tell(error)

    @functools.wraps(function)
    def piecewise(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except Exception as error:
            yield tell(error)

    return piecewise if generates else once


def checked_text(text: str | None, what: str) -> str:
    """Return a visitor's text without spaces around; ValueError if there is none or too much."""
    text = (text or "").strip()
    if not text:
        raise ValueError(f"type {what} first")
    if len(text) > MOST_LETTERS:
        raise ValueError(f"{what} of {len(text):,} letters: at most {MOST_LETTERS:,} here")
    return text


def text_box(label: str, example: str, name: str) -> gr.Textbox:
    # Longer texts can be pasted, so that `checked_text` says what is wrong instead of cutting them.
    return gr.Textbox(label=label, placeholder=example, elem_id=name, max_length=20 * MOST_LETTERS)


def shown_picture(label: str, **options: Any) -> gr.Image:
    """Return a picture that the page shows."""
    usual = {"height": codes.SIDE, "format": "png", "buttons": ["download"], "interactive": False}
    return gr.Image(label=label, **usual | options)


def upload(label: str, name: str) -> gr.Image:
    """Return a place for a visitor's picture; functions get its path, for `read_upload`."""
    sources = ["upload", "clipboard"]
    picture = gr.Image(
        label=label, type="filepath", sources=sources, height=codes.SIDE, elem_id=name
    )
    # Gradio would decode it, and say nothing of a file that is no picture.
    picture.preprocess = lambda payload: payload and payload.path
    return picture


def read_upload(path: str) -> np.ndarray:
    """Return an uploaded picture, uint8 (H, W, 3); ValueError names it as the visitor does."""
    try:
        return read_picture(path, "the picture")
    except ValueError as error:
        raise ValueError(str(error).replace(path, os.path.basename(path))) from error
