"""The page: its tabs, and how it is served. Needs Gradio."""

import socket

import gradio as gr

from tokenflow_jax.demo import chat_tab, codes_tab, draw_tab
from tokenflow_jax.demo.models import Models

MOST_BYTES = 32 * 2**20  # of an upload
_WAITING = 32  # requests in the queue
_STYLE = 'button[aria-label="Share"] { display: none; }'  # it would upload to another server


def build(models: Models) -> gr.Blocks:
    """Return the page of these models, not launched yet."""
    # Nothing is fetched or reported anywhere: no analytics, no fonts of other servers.
    with gr.Blocks(title="TokenFlow", analytics_enabled=False) as page:
        gr.Markdown(f"# TokenFlow\n{_about(models)}")
        with gr.Tab("Codes"):
            codes_tab.build(models)
        if models.generator:
            with gr.Tab("Draw"):
                drawn = draw_tab.build(models)
            with gr.Tab("Edit"):
                draw_tab.build_edit(models, drawn)
        if models.assistant:
            with gr.Tab("Chat"):
                chat_tab.build(models, drawn if models.generator else None)
    return page


def launch(page: gr.Blocks, host: str, port: int, share: bool) -> str:
    """Serve the page in threads of this process, and return its address."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    if not port:
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    _, address, shared = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MOST_BYTES,
        state_session_capacity=64,
        ssr_mode=False,
        css=_STYLE,
        theme=gr.themes.Default(**fonts),
        footer_links=[],
    )
    return shared or address


def _about(models: Models) -> str:
    config = models.tokenizer.config
    scales = ", ".join(f"{side} x {side}" for side in config.scales)
    lines = [
        f"A picture of {config.image_size} px becomes {config.length} codes of {config.codes:,}: "
        f"grids of {scales}, coarse to fine."
    ]
    if models.generator:
        lines.append("The model writes these codes scale by scale to draw.")
    if models.assistant:
        lines.append("It reads the finest scale to answer.")
    return " ".join(lines)
