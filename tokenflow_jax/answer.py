r"""Answer questions about pictures with a trained understanding model.

    python -m tokenflow_jax.answer --checkpoint=runs/understanding --image=apple.png \
        --question="Which kind of thing is this?"
    python -m tokenflow_jax.answer --checkpoint=runs/understanding --image=apple.png --chat
    python -m tokenflow_jax.answer --checkpoint=RELEASED_FOLDER --tokenizer=tokenflow_xl.pt \
        --tokenizer_variant=xl --question="Name three prime numbers."

The answer appears word by word. With --chat more questions are read from the terminal, where
`/image PATH` shows another picture with the next question, `/reset` starts over and `/help` lists
the rest. A unified model also draws: `/draw red apple` writes a picture into --out, and questions
can be about it. Ctrl-C stops an answer, or ends with exit code 130.
"""

import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from tokenflow_jax import cli, compile_cache
from tokenflow_jax.data.pictures import read_picture
from tokenflow_jax.log import compiling
from tokenflow_jax.messages import printable

_HELP = """\
  /image PATH   show a picture with the next question; without PATH: none
  /draw TEXT    draw a picture into --out, which later questions can be about
  /reset        start over
  /help         this list
  An empty line or Ctrl-D ends; Ctrl-C stops an answer."""


def main(options: flags.FlagValues) -> None:
    cli.require(options, "checkpoint")
    if not options.question and not options.chat:
        raise ValueError("nothing to ask: give --question, or --chat to ask from the terminal")
    image = None if options.image is None else read_picture(options.image)  # before it loads
    text = compiling(f"loading {options.checkpoint} and compiling", 20)
    print(printable(text), file=sys.stderr, flush=True)
    compile_cache.set_up(None)
    assistant = load_assistant(options)
    names = ("max_new", "temperature", "top_k", "top_p", "seed")
    chosen = {name: options[name].value for name in names}
    if options.chat:
        print(f"{type(assistant).__name__} {printable(options.checkpoint)}: ask; /help lists more")
        _chat(assistant, options.question, image, chosen, options.out)
    else:
        for question in options.question:
            if len(options.question) > 1:
                print(f"> {printable(question)}")
            _print(assistant.chat().stream(question, image, **chosen))


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print(flush=True)


def _chat(
    assistant: Any, first: Sequence[str], image: Any, chosen: dict[str, Any], out: str
) -> None:
    """Hold a conversation: the `first` questions, then those of the terminal."""
    chat = assistant.chat()

    def ask(question: str) -> None:
        nonlocal image
        _print(chat.stream(question, image, **chosen))
        image = None  # it is part of the conversation now

    def show(path: str) -> None:
        nonlocal image
        image = read_picture(path) if path else None

    def reset(_: str) -> None:
        nonlocal chat, image
        chat, image = assistant.chat(), None

    def draw(request: str) -> None:
        if not hasattr(chat, "draw"):
            raise ValueError(
                "this model only reads: /draw needs a unified model (configs/unified.py)"
            )
        path = _free_name(out)
        chat.draw(request, seed=chosen["seed"]).save(path)
        print(path)

    commands = {
        "/image": show, "/draw": draw, "/reset": reset, "/new": reset,
        "/help": lambda _: print(_HELP),
    }  # fmt: skip
    for question in first:
        print(f"> {printable(question)}")
        ask(question)
    while True:
        try:
            print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
        except KeyboardInterrupt:
            print()
            raise
        if not line:
            return
        word, _, rest = line.partition(" ")
        try:
            if word.startswith("/") and word not in commands:
                raise ValueError(f"there is no command {word}; /help lists them")
            commands[word](rest.strip()) if word in commands else ask(line)
        except (OSError, ValueError) as error:  # a broken picture, a folder without access
            print(printable(str(error)))
        except KeyboardInterrupt:
            print(" (stopped)")


def _free_name(folder: str) -> str:
    """Return the first unused name of a picture."""
    os.makedirs(folder, exist_ok=True)
    names = (os.path.join(folder, f"drawn_{i:03d}.png") for i in itertools.count())
    return next(name for name in names if not os.path.exists(name))


def load_assistant(options: flags.FlagValues) -> Any:
    from tokenflow_jax.unified import api  # here, so that --help is quick

    names = ("tokenizer", "tokenizer_variant", "text_tokenizer", "template", "system",
             "image_mode", "step", "dtype", "weights_dtype")  # fmt: skip
    known = {name: options[name].value for name in names}
    return api.load_assistant(options.checkpoint, options.variant, **known)


def define_assistant_flags(define: cli.Define) -> None:
    define.string("checkpoint", None, "A workdir, a checkpoint, or a folder like the released.")
    define.string("variant", None, "Which model PyTorch weights without config.json are.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.string("tokenizer", None, "The image tokenizer; a training run knows it.")
    define.string("tokenizer_variant", None, "Which model a PyTorch tokenizer is.")
    define.string("text_tokenizer", None, "A folder or bytes; a training run knows it.")
    define.string("template", None, "Of conversations; a training run knows it.")
    define.string("system", None, "What conversations begin with, instead of the template's.")
    define.enum("image_mode", None, ["pad", "square"], "As in training; a training run knows it.")
    define.enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Compute in.")
    define.enum("weights_dtype", "", ["", "int8", "int4", "nf4"], "Of the decoder's layers.")


def define_flags(define: cli.Define) -> None:
    define_assistant_flags(define)
    define.string("image", None, "The picture; omit for text-only questions.")
    define.multi_string("question", [], "May be repeated.")
    define.bool("chat", False, "Continue with questions from the terminal.")
    define.string("out", "drawn", "Folder for the pictures of /draw.")
    define.integer("max_new", 256, "Tokens of an answer at most.")
    define.float("temperature", 0.0, "0 takes the most likely token.")
    define.integer("top_k", 0, "Draw from the k most likely tokens; 0: off.")
    define.float("top_p", 0.0, "Draw from the likeliest share; 0: off.")
    define.integer("seed", 0, "Seed of the draws.")


run = functools.partial(cli.run, "answer", main, define_flags, runtime=False, verbose=False)

if __name__ == "__main__":
    sys.exit(run())
