"""The tab of a conversation: questions about pictures, and pictures drawn in between."""

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from tokenflow_jax.data.pictures import fit
from tokenflow_jax.demo import codes
from tokenflow_jax.demo.models import Models
from tokenflow_jax.demo.parts import checked_text, read_upload, text_box, told, upload

_FORGET = 3600  # seconds after which an idle visitor's conversation is dropped
_ANSWER = 128  # tokens at most


def build(models: Models, drawn: gr.Image | None) -> None:
    """Put the tab on the page that is being built; `drawn` is the picture of the tab Draw."""
    size = models.tokenizer.config.image_size
    state = gr.State(None, time_to_live=_FORGET)
    talk = gr.Chatbot(label="Conversation", height=420, buttons=[], elem_id="talk")
    with gr.Row():
        with gr.Column(scale=1):
            picture = upload("Picture to ask about", "asked")
            if drawn is not None:
                take = gr.Button("Take the drawn picture")
        with gr.Column(scale=2):
            question = text_box("Question", "Which kind of thing is this?", "question")
            with gr.Row():
                send = gr.Button("Ask", variant="primary")
                if models.draws_in_chat:
                    request = gr.Button("Draw this")
                again = gr.Button("New conversation")

    def shown(picture_HWC: np.ndarray | Image.Image) -> gr.Image:
        return gr.Image(codes.enlarged(picture_HWC), buttons=[], show_label=False)

    def ask(chat: Any, said: list, path: str | None, question: str):
        question = checked_text(question, "a question")
        image = None if path is None else read_upload(path)
        chat = chat or models.assistant.chat()
        if image is not None:
            said = [*said, {"role": "user", "content": shown(fit(image, size))}]
        said = [*said, {"role": "user", "content": question}]
        yield chat, said, None, ""
        answer = ""
        for piece in chat.stream(question, image, max_new=_ANSWER):
            answer += piece
            # What is typed meanwhile stays.
            yield chat, [*said, {"role": "assistant", "content": answer}], gr.skip(), gr.skip()
        if not answer.strip():
            yield chat, [*said, {"role": "assistant", "content": "..."}], gr.skip(), gr.skip()

    def draw(chat: Any, said: list, path: str | None, text: str):
        text = checked_text(text, "what to draw")
        chat = chat or models.assistant.chat()
        made = shown(chat.draw(text))
        answer = {"role": "assistant", "content": made}
        return chat, [*said, {"role": "user", "content": text}, answer], path, ""

    inputs, outputs = [state, talk, picture, question], [state, talk, picture, question]
    gr.on([send.click, question.submit], told(ask), inputs, outputs)
    if models.draws_in_chat:
        request.click(told(draw), inputs, outputs)
    again.click(lambda: (None, [], None, ""), None, outputs)
    if drawn is not None:
        take.click(lambda one: one, drawn, picture)
