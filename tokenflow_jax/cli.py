"""The command line of every program: flags, help, one-line errors, processes and log.

absl parses the flags, since ml_collections' overrides (--config.batch_size=512) are absl flags and
one parser for all programs means one spelling (--ema, --noema) and one hint for a misspelled flag.
"""

import functools
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging

from tokenflow_jax import compile_cache, config_flag, log
from tokenflow_jax.messages import printable
from tokenflow_jax.parallel import distributed


class Define:
    """absl's DEFINE functions on one set of flags: `define.string("out", None, "Folder.")`."""

    def __init__(self, options: flags.FlagValues):
        self._options = options

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        return functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=self._options)


def run(
    program: str,
    main: Callable[[flags.FlagValues], int | None],
    define_flags: Callable[[Define], None],
    argv: Sequence[str] | None = None,
    *,
    config: bool = False,
    positional: str = "",
    runtime: bool = True,
    verbose: bool = True,
) -> int:
    """Run a program and return its exit code: main's, 2 after a one-line error, 130 after Ctrl-C.

    Args:
      program: its name in front of errors; its help begins with the docstring of main's module.
      main: does the work; a ValueError or OSError of it is the user's mistake.
      argv: arguments to use instead of the process's own.
      config: adds --config and its overrides; main finds a ConfigDict in `options.config`.
      positional: the flag that an argument without dashes sets; none by default.
      runtime: join the other processes before main; loads jax.
      verbose: log info lines, not only warnings; of several processes only the first one does.
    """
    argv = [program, *(sys.argv[1:] if argv is None else argv)]
    options = flags.FlagValues()
    define = Define(options)
    define_flags(define)
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)  # of libraries; programs have their own log
    try:
        if any(re.fullmatch(r"--?(h|help|helpfull|helpshort)", argument) for argument in argv):
            print(_help(sys.modules[main.__module__].__doc__, options, config, runtime, argv))
            return 0
        if config:
            config_flag.define(options, argv)
        if runtime:
            distributed.define_flags(define)
            compile_cache.define_flag(define)
        options.append_flag_values(flags.FLAGS)
        _parse(options, argv, positional)
        if runtime:
            distributed.start(options)
            import jax  # here, so that a wrong flag is reported at once

            verbose = verbose and jax.process_index() == 0
        log.set_up(verbose)
        if runtime:
            workdir = options.workdir if "workdir" in options else None
            compile_cache.set_up(options.compile_cache, workdir)
        return main(options) or 0
    except (ValueError, OSError) as error:
        if absl_logging.level_debug():
            raise
        print(printable(f"{program}: {error}"), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130


def require(options: flags.FlagValues, *names: str) -> None:
    """Raise ValueError that lists every named flag without a value."""
    if missing := [f"--{name}" for name in names if not options[name].value]:
        raise ValueError(f"missing {' and '.join(missing)}")


def _parse(options: flags.FlagValues, argv: Sequence[str], positional: str) -> None:
    try:
        words = options(argv)[1:]
        if words and positional:
            options[positional].parse(words.pop(0))
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split("Traceback")[0].split())) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of ml_collections
        raise ValueError(f"wrong --config flag: {' '.join(str(error).split())}") from error
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}; options begin with --")
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's own set


def _help(
    doc: str, options: flags.FlagValues, config: bool, runtime: bool, argv: Sequence[str]
) -> str:
    """Return one screen: what the program does, its own flags, and the configs there are."""
    rows = [_describe(options[name]) for name in options]
    if config:
        text = "A file, or a config below by name; --config.batch_size=512 changes one value."
        rows.insert(0, ("--config=NAME:VARIANT", text))
    if runtime:
        text = "Join other processes, with --coordinator, --num_processes and --process_id where"
        rows.append(("--distributed", f"{text} needed; detected by default."))
        text = "Folder that keeps compiled programs for the next start, or off."
        rows.append(("--compile_cache", text))
    lines = [doc.strip(), "", "Flags [default]:", *_table(rows)]
    if config:
        title, rows = config_flag.describe(argv)
        lines += ["", title, *_table(rows)]
    return "\n".join(lines)


def _describe(flag: flags.Flag) -> tuple[str, str]:
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    shown = "" if default in (None, "", False) else f" [{str(default).lower()}]"
    text = flag.help.replace("<|", "<").split(";\n")[0]  # absl adds "repeat this option ..."
    return f"--{'[no]' * flag.boolean}{flag.name}", text + shown


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 4
    return [
        line
        for name, text in rows
        for line in textwrap.wrap(
            f"  {name:<{width - 2}}{text}",
            100,
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    ]
