"""Object stores through fsspec: which paths are theirs, one set-up, errors of one line.

They answer with many kinds of errors. Here each is an OSError with the path.
"""

import contextlib
import errno
import functools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from tokenflow_jax.messages import one_line

_PACKAGES = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "hf": "hub"}  # scheme -> extra of setup.py
_HALF = re.compile(r"(gs|gcs|s3|hf):(?!//)")  # as a path it would make a local folder "gs:"
_SILENCE_S = 60.0  # of a store, after which a request has failed; gcsfs repeats it five times


def is_remote(path: str | os.PathLike) -> bool:
    path = os.fspath(path)
    if half := _HALF.match(path):
        raise ValueError(f"{path!r}: write {half.group()}// (a local folder needs another name)")
    if "://" not in path:
        return False
    _set_up()
    return True


@functools.cache
def _set_up() -> None:
    """Set fsspec up, before anything makes a file system: stores of etils are those of this."""
    import fsspec  # here: most runs need none

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is raised anyway
    for scheme in ("gcs", "gs", "s3"):  # other hosts write, too
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    with contextlib.suppress(ImportError):  # gcsfs, which needs it, would wait for ever
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        for scheme in ("gcs", "gs"):
            fsspec.config.conf[scheme].setdefault("requests_timeout", patience)


@contextlib.contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise whatever a store answers as an OSError, or as ValueError where a package is missing."""
    path = os.fspath(path)
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file or bucket", path) from error
    except ImportError as error:
        extra = _PACKAGES.get(path.split("://")[0])
        remedy = f": pip install 'tokenflow_jax[{extra}]'" if extra else ""
        raise ValueError(f"{path}: {one_line(error)}{remedy}") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            raise ValueError(f"{path}: {one_line(error)}; use gs://, s3:// or a path") from error
        code = str(getattr(error, "code", "") or getattr(error, "status", ""))
        refused = code in ("401", "403") or str(error).startswith("Forbidden")  # gcsfs says so
        if refused or "auth" in type(error).__module__:
            raise PermissionError(
                errno.EACCES, f"access denied ({one_line(error)}); log in to the store", path
            ) from error
        if isinstance(error, OSError) and error.filename == path:
            raise
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(number, one_line(error) or type(error).__name__, path) from error


def store_of(path: str | os.PathLike) -> tuple[Any, str]:
    """Return fsspec's file system of a path, and the path as that names it; not cached listings."""
    import fsspec

    _set_up()
    with named_errors(path):
        store, name = fsspec.core.url_to_fs(os.fspath(path))
    if not name.strip("/"):
        raise ValueError(f"{os.fspath(path)!r} names no bucket: write gs://BUCKET/PATH")
    return store, name
