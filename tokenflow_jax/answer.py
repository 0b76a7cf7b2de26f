"""Answers questions about pictures with a trained understanding model.

    python -m tokenflow_jax.answer --checkpoint=runs/understanding --image=apple.png \
        --question="Which kind of thing is this?"
    python -m tokenflow_jax.answer --checkpoint=runs/understanding --image=apple.png --chat
    python -m tokenflow_jax.answer --checkpoint=RELEASED_FOLDER --tokenizer=tokenflow_xl.pt \
        --tokenizer_variant=xl --question="Name three prime numbers."

The answer appears word by word. With --chat further questions are read from the terminal: an empty
line ends, `/image PATH` shows another picture with the next question, `/new` begins again. A
picture may be left out. Exit codes: 0 done, 2 wrong flags, weights or pictures.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO


def main(argv: Sequence[str] | None = None) -> int:
    """Answers; returns the exit code."""
    options = _parser().parse_args(argv)
    if not options.question and not options.chat:
        _parser().error("say what to ask with --question, or --chat to ask from the terminal")
    from tokenflow_jax.understanding import api as understanding  # here, so that --help is quick

    try:
        assistant = understanding.Assistant.load(
            options.checkpoint,
            options.variant,
            tokenizer=options.tokenizer,
            tokenizer_variant=options.tokenizer_variant,
            text_tokenizer=options.text_tokenizer,
            template=options.template,
            system=options.system,
            image_mode=options.image_mode,
            step=options.step,
            dtype=options.dtype,
        )
        chosen = {name: getattr(options, name) for name in _DECODING}
        if options.chat:
            _chat(assistant, options.question, options.image, chosen, sys.stdin, sys.stdout)
        else:
            for question in options.question:
                pieces = assistant.chat().stream(question, options.image, **chosen)
                _print(pieces, sys.stdout)
    except (ValueError, OSError) as error:
        print(f"answer: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


_DECODING = ("max_new", "temperature", "top_k", "top_p", "seed")


def _print(pieces: Iterator[str], out: TextIO) -> None:
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()


def _chat(
    assistant: Any,
    first: Sequence[str],
    image: str | None,
    chosen: dict[str, Any],
    lines: TextIO,
    out: TextIO,
) -> None:
    """A conversation; `first` are questions that are asked before those of the terminal."""
    chat = assistant.chat()

    def ask(question: str) -> None:
        nonlocal image
        _print(chat.stream(question, image, **chosen), out)
        image = None  # it is part of the conversation now

    for question in first:
        out.write(f"> {question}\n")
        ask(question)
    while True:
        out.write("> ")
        out.flush()
        line = lines.readline().strip()
        if not line:
            return
        if line == "/new":
            chat, image = assistant.chat(), None
        elif line.startswith("/image"):
            image = line.removeprefix("/image").strip() or None
        else:
            try:
                ask(line)
            except ValueError as error:  # a picture that is none, a conversation that is too long
                out.write(f"{error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenflow_jax.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint", required=True, help="a workdir, a checkpoint, or a folder like the released"
    )
    add("--variant", help="which model PyTorch weights without config.json are")
    add("--step", type=int, help="which checkpoint of a workdir; the newest")
    add("--tokenizer", help="the image tokenizer; a training run knows")
    add("--tokenizer_variant", help="which model a PyTorch tokenizer is")
    add("--text_tokenizer", help="a folder or bytes; a training run knows")
    add("--template", help="of conversations; a training run knows")
    add("--system", help="what conversations begin with, if not as the template says")
    add("--image_mode", choices=("pad", "square"), help="as in training; a training run knows")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--image", help="the picture; without one the question is about nothing")
    add("--question", action="append", default=[], help="may be given several times")
    add("--chat", action="store_true", help="go on with questions from the terminal")
    add("--max_new", type=int, default=256, help="tokens of an answer at most")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top_k", type=int, default=0, help="draws from the k most likely tokens; 0 is off")
    add("--top_p", type=float, default=0.0, help="draws from the likeliest share; 0 is off")
    add("--seed", type=int, default=0, help="of the draws")
    return parser


if __name__ == "__main__":
    sys.exit(main())
