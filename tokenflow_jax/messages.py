"""Text for errors and logs: values from files, lists of problems, control characters."""

import re
import reprlib
from collections.abc import Iterable
from typing import Any

_LONGEST = 200  # characters of a value
_MOST_LINES = 10  # of a list
_LONGEST_LINE = 150

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _LONGEST
_repr.maxlevel = 3


def shown(value: Any) -> str:
    """Return the repr of a value from a file, cut to 200 characters and to few levels."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def plain(name: str) -> str:
    """Return a name from a file, escaped and cut as `shown` does, without quotes."""
    return shown(name)[1:-1]


def bullets(lines: Iterable[str]) -> str:
    """Return the first ten lines as a list, each printable and short, and a count of the rest."""
    lines = list(lines)
    more = [f"and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"  - {one_line(line, _LONGEST_LINE)}" for line in lines[:_MOST_LINES] + more)


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """Return the text of a library's error on one line, printable and cut to `longest`."""
    text = printable(" ".join(str(error)[: 10 * longest].split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# Also those that start a terminal's command in eight bits, and lone surrogates, which no stream
# can encode.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """Escape the control characters of a text, except tabs and line ends, for a terminal."""
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)
