r"""Show models on a page in the browser: codes of a picture, drawing, editing, a chat.

    python -m tokenflow_jax.demo                               the tokenizer inside the package
    python -m tokenflow_jax.demo --checkpoint=runs/unified
    python -m tokenflow_jax.demo --checkpoint=runs/generation --checkpoint=runs/understanding

Needs `pip install 'tokenflow_jax[demo]'`. The page is for this machine alone (127.0.0.1) unless
--host says otherwise; nothing leaves it. Ctrl-C ends the server.
"""

import functools
import importlib.util
import sys
import threading

from absl import flags

from tokenflow_jax import cli
from tokenflow_jax.log import log


def main(options: flags.FlagValues) -> None:
    """Load the checkpoints and serve the page until Ctrl-C."""
    if not importlib.util.find_spec("gradio"):
        raise ValueError("the page needs Gradio: pip install 'tokenflow_jax[demo]'")
    log.info("loading %s", ", ".join(options.checkpoint))
    from tokenflow_jax.demo import models  # here, so that --help is quick

    loaded = models.load(options.checkpoint, options.tokenizer)
    from tokenflow_jax.demo import app

    address = app.launch(app.build(loaded), options.host, options.port, options.share)
    log.info("the first click on each button compiles, usually 5 to 20 s")
    print(f"open {address}   (Ctrl-C ends)", flush=True)
    threading.Event().wait()


def define_flags(define: cli.Define) -> None:
    define.multi_string("checkpoint", ["emoji"], "A model of any stage; may be repeated.")
    define.string("tokenizer", None, "The image tokenizer, if it has moved.")
    define.string("host", "127.0.0.1", "Address that the server listens at.")
    define.integer("port", 7860, "Port; 0 takes a free one.")
    define.bool("share", False, "Let Gradio's servers make the page public.")


run = functools.partial(cli.run, "demo", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
