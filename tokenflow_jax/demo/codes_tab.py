"""The tab of a picture's codes: reconstruction by scales, replaced codes, similar emoji."""

import gradio as gr
import numpy as np
from PIL import Image

from tokenflow_jax.demo import codes
from tokenflow_jax.demo.models import Models
from tokenflow_jax.demo.parts import read_upload, shown_picture, told, upload


def build(models: Models) -> None:
    """Put the tab on the page that is being built."""
    tokenizer, scales = models.tokenizer, models.tokenizer.config.pyramid
    shared, last = tokenizer.config.quantizer.shared_index, len(scales)
    neighbors = codes.Neighbors(tokenizer)
    own, place = gr.State(None), gr.State(None)  # codes (L,) as they are now; the chosen one
    with gr.Row():
        original = upload("Picture", "picture")
        rebuilt = shown_picture("Reconstruction", elem_id="reconstruction")
        grid = shown_picture("Codes of this scale: click one", elem_id="code_map")
    slider = gr.Slider(1, last, value=last, step=1, label="Scales that are decoded")
    with gr.Row():
        with gr.Column():
            chosen = gr.Textbox(label="Chosen code", interactive=False)
            new = gr.Number(label="Another code in its place", precision=0, minimum=0, value=0)
            with gr.Row():
                replace = gr.Button("Replace")
                reset = gr.Button("All codes as they were")
        difference = shown_picture("What replaced codes change, ten times as bright")
        near = gr.Gallery(
            label="Emoji that mean something similar", columns=4, height=codes.SIDE, preview=False,
            buttons=[],
        )  # fmt: skip
    search = gr.Button("Find similar emoji (the first time takes a minute)")

    def decoded(codes_L: np.ndarray, count: float) -> Image.Image:
        end = scales.slices()[int(count) - 1].stop * tokenizer.config.quantizer.heads
        return codes.enlarged(tokenizer.to_images(codes_L[None, :end])[0])

    def views(codes_L: np.ndarray, count: float) -> tuple[Image.Image, Image.Image | None]:
        drawn = codes.code_map(codes_L, scales, int(count) - 1) if shared else None
        return decoded(codes_L, count), drawn

    def encode(path: str | None, count: float):
        if path is None:
            return None, None, None, None, None, ""
        codes_L = np.asarray(tokenizer.encode(read_upload(path)))[0]
        return codes_L, *views(codes_L, count), None, None, ""

    def show(codes_L: np.ndarray | None, count: float):
        return (None, None) if codes_L is None else views(codes_L, count)

    def choose(codes_L: np.ndarray | None, count: float, event: gr.SelectData):
        if codes_L is None:
            raise ValueError("give a picture first")
        where = codes.cell_at(scales, int(count) - 1, *event.index[:2])
        code = int(codes_L[where])
        like = codes.nearest_codes(tokenizer, code)
        text = (
            f"code {code}; in meaning like {like['semantic']}, in appearance like {like['pixel']}"
        )
        return where, text, like["semantic"][0]

    def change(path: str | None, codes_L: np.ndarray | None, where: int | None, code: float | None,
               count: float):  # fmt: skip
        if codes_L is None or where is None:
            raise ValueError("give a picture and click on one of its codes first")
        if code is None or not 0 <= int(code) < tokenizer.config.codes:
            raise ValueError(f"codes are 0 to {tokenizer.config.codes - 1}")
        changed_L = codes_L.copy()
        changed_L[where] = int(code)
        kept_1L = np.asarray(tokenizer.encode(read_upload(path)))
        before = codes.enlarged(tokenizer.to_images(kept_1L)[0])
        after = decoded(changed_L, last)
        return changed_L, *views(changed_L, count), codes.change(before, after)

    def similar(codes_L: np.ndarray | None):
        if codes_L is None:
            raise ValueError("give a picture first")
        return neighbors.of(codes_L)

    views_of = [own, rebuilt, grid, difference, place, chosen]
    original.change(told(encode), [original, slider], views_of)
    slider.change(told(show), [own, slider], [rebuilt, grid], show_progress="hidden")
    reset.click(told(encode), [original, slider], views_of)
    search.click(told(similar), own, near)
    grid.visible = replace.interactive = shared
    if shared:
        grid.select(told(choose), [own, slider], [place, chosen, new])
        replace.click(
            told(change), [original, own, place, new, slider], [own, rebuilt, grid, difference]
        )
