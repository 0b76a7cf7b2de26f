"""The tabs that draw: a prompt becomes a picture scale by scale, a painted part is drawn anew."""

import time
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from tokenflow_jax.data.pictures import read_picture
from tokenflow_jax.demo import codes
from tokenflow_jax.demo.models import Models
from tokenflow_jax.demo.parts import checked_text, shown_picture, text_box, told

_FRAME = 0.25  # seconds that each scale of a drawing is shown
_ROW = 150  # pixels of a row of scales on the page
_EXAMPLES = ("red apple", "dog face", "blue heart", "sunflower", "fire engine")


def _options(models: Models) -> tuple[gr.Number, gr.Slider, gr.Radio]:
    recipe = models.generator.recipe
    with gr.Row():
        seed = gr.Number(label="Seed", value=recipe.seed, precision=0)
        guidance = gr.Slider(0, 10, value=recipe.guidance, step=0.1, label="Guidance")
        passes = gr.Radio(
            [1, 2, 3],
            value=len(recipe.passes),
            label="Passes over a scale",
            info="The paper's model gains from several, the one that ships draws worse.",
        )
    return seed, guidance, passes


def _changes(models: Models, seed: float, guidance: float, passes: int) -> dict[str, Any]:
    recipe = models.generator.recipe
    same = passes == len(recipe.passes)
    return {
        "seed": int(seed or 0) % 2**31,
        "guidance": float(guidance),
        "passes": recipe.passes if same else int(passes),
    }


def build(models: Models) -> gr.Image:
    """Put the tab on the page that is being built; return the drawn picture."""
    generator = models.generator
    with gr.Row():
        with gr.Column():
            prompt = text_box("Prompt", "red apple", "prompt")
            gr.Examples([[one] for one in _EXAMPLES], prompt, label="For example")
            options = _options(models)
            button = gr.Button("Draw", variant="primary")
        picture = shown_picture("Drawn", type="pil", elem_id="drawn")
        height = _ROW * -(-len(generator.config.scales) // 2) + 20  # all of them without scrolling
        growth = gr.Gallery(
            label="Scale by scale", columns=2, height=height, buttons=[], elem_id="growth"
        )

    def draw(prompt: str, *chosen: Any):
        drawn = generator.generate(checked_text(prompt, "a prompt"), **_changes(models, *chosen))
        frames = []
        for side, frame in zip(
            generator.config.scales, generator.previews(drawn.codes), strict=True
        ):
            shown = codes.enlarged(frame[0])
            frames.append((shown, f"{side} x {side}"))
            yield shown, list(frames)
            time.sleep(_FRAME)

    inputs, outputs = [prompt, *options], [picture, growth]
    gr.on([button.click, prompt.submit], told(draw), inputs, outputs)
    return picture


def build_edit(models: Models, drawn: gr.Image) -> None:
    """Put the tab of edits on the page that is being built."""
    generator = models.generator
    with gr.Row():
        with gr.Column():
            editor = gr.ImageEditor(
                label="Picture: paint over what is to change", type="pil", image_mode="RGBA",
                layers=False, transforms=(), sources=["upload", "clipboard"], height=480,
                canvas_size=(codes.SIDE, codes.SIDE), elem_id="editor",
                brush=gr.Brush(default_size=40, colors=["#ff3b30"], color_mode="fixed"),
            )  # fmt: skip
            take = gr.Button("Take the drawn picture")
            prompt = text_box("Prompt of the edit", "green apple", "edit_prompt")
            options = _options(models)
            button = gr.Button("Edit", variant="primary")
        result = shown_picture("Edited", elem_id="edited")

    def edit(painted: dict[str, Any] | None, prompt: str, *chosen: Any):
        background = (painted or {}).get("background")
        if background is None:
            raise ValueError("give a picture first")
        layers = painted["layers"]
        masks = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
        mask = np.any(masks, axis=0) if masks else np.zeros(())
        if not mask.any():
            raise ValueError("paint over what is to change first")
        image_HWC = read_picture(background)
        if mask.shape != image_HWC.shape[:2]:
            raise ValueError("the picture is still loading: try again")
        asked = {"image": image_HWC, "mask": mask, **_changes(models, *chosen)}
        return codes.enlarged(
            generator.generate(checked_text(prompt, "a prompt"), **asked).images[0]
        )

    def taken(picture: Image.Image | None):
        if picture is None:
            raise ValueError("draw a picture first")
        return picture

    take.click(told(taken), drawn, editor)
    gr.on([button.click, prompt.submit], told(edit), [editor, prompt, *options], result)
