"""The run's own log: progress on stdout, warnings and errors on stderr, nothing from libraries."""

import logging
import sys

log = logging.getLogger("tokenflow_jax")


class _Below(logging.Filter):
    """Lets pass what is less serious than a level."""

    def __init__(self, level: int):
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < self._level


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a page of tracebacks for an error that it raises as well."""
    return "orbax" not in record.pathname


def hush_tensorstore() -> None:
    """Leaves out what TensorStore says when Orbax stops waiting for writes of which one failed.

    That one is raised as an error; the others find nobody to report to, a traceback each. May be
    called again.
    """
    others = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    hook.hushes_tensorstore = True
    if not hasattr(others, "hushes_tensorstore"):
        sys.unraisablehook = hook


def set_up(verbose: bool = True) -> None:
    """Sends the log of this project to the terminal; may be called again.

    Args:
      verbose: also info lines; False on all processes but the first.
    """
    out, err = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    out.addFilter(_Below(logging.WARNING))
    err.setLevel(logging.WARNING)
    out.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    err.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [out, err]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    logging.getLogger("absl").addFilter(_is_not_orbax)
    hush_tensorstore()
