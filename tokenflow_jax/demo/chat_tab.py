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
    # The model's conversation, and what the page shows of it: kept here, since a click brings the
    # page's own as it was then, without what is being answered.
    state = gr.State((None, []), time_to_live=_FORGET)
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
    stored = gr.Image(format="png", render=False)

    def message(role: str, content: str | np.ndarray | Image.Image) -> dict[str, Any]:
        if not isinstance(content, str):
            content = {"path": stored.postprocess(codes.enlarged(content)).path}
        return {"role": role, "content": content}

    def ask(kept: tuple[Any, list], path: str | None, question: str):
        question = checked_text(question, "a question")
        image = None if path is None else read_upload(path)
        chat, said = kept[0] or models.assistant.chat(), kept[1]
        if image is not None:
            said = [*said, message("user", fit(image, size))]
        said = [*said, message("user", question)]
        yield (chat, said), said, None, ""
        answer = ""
        for piece in chat.stream(question, image, max_new=_ANSWER):
            answer += piece
            now = [*said, message("assistant", answer)]
            yield (chat, now), now, gr.skip(), gr.skip()  # what is typed meanwhile stays
        if not answer.strip():
            now = [*said, message("assistant", "...")]
            yield (chat, now), now, gr.skip(), gr.skip()

    def draw(kept: tuple[Any, list], text: str):
        text = checked_text(text, "what to draw")
        chat, said = kept[0] or models.assistant.chat(), [*kept[1], message("user", text)]
        yield (chat, said), said, ""
        said = [*said, message("assistant", chat.draw(text))]
        yield (chat, said), said, gr.skip()

    inputs, outputs = [state, picture, question], [state, talk, picture, question]
    # In turn: all go on with the same conversation.
    turn = {"concurrency_id": "conversation", "concurrency_limit": 1}
    gr.on([send.click, question.submit], told(ask), inputs, outputs, **turn)
    if models.draws_in_chat:
        request.click(told(draw), [state, question], [state, talk, question], **turn)
    anew = [again.click, talk.clear]
    gr.on(anew, lambda: ((None, []), [], None, ""), None, outputs, **turn)
    if drawn is not None:
        take.click(lambda one: one, drawn, picture)
