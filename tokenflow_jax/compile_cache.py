"""JAX's cache of compiled programs on disk: a rerun's first step takes a third of the time."""

import contextlib
import hashlib
import os
import pathlib
from typing import Any

from tokenflow_jax import remote
from tokenflow_jax.log import log

VARIABLE = "TOKENFLOW_COMPILE_CACHE"
_LEAST_SECONDS = 0.2  # programs that compile faster are not kept
_MOST_BYTES = 8 * 2**30  # of a local folder; those used longest ago are removed


def define_flag(define: Any) -> None:
    """Define --compile_cache, by a `cli.Define`."""
    define.string(
        "compile_cache",
        None,
        f"Folder (gs:// too) that keeps compiled programs, or off; by default ${VARIABLE}, else "
        "one in a remote workdir, else in the user's cache folder.",
    )


def set_up(choice: str | None, workdir: str | None = None) -> None:
    """Keep compiled programs in a folder, unless JAX's own variable names another or none.

    Without a choice that is the user's cache folder or, if a run's `workdir` is remote, one in it:
    machines come and go then.
    """
    import jax  # here, so that wrong flags are reported at once

    choice = choice or os.environ.get(VARIABLE)
    own = "JAX_COMPILATION_CACHE_DIR" in os.environ or "JAX_ENABLE_COMPILATION_CACHE" in os.environ
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not choice and own:
        return
    if not choice and workdir and remote.is_remote(workdir):
        choice = remote.join(workdir, "compiled")
    if not choice or "://" not in choice:
        choice = os.path.abspath(choice or remote.cache_folder() / f"compiled-{_processor()}")
        try:
            os.makedirs(choice, exist_ok=True)
        except OSError as error:
            log.warning("compiled programs are not kept (%s); see --compile_cache", error)
            return
        _add_times(pathlib.Path(choice))
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", choice)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _add_times(folder: pathlib.Path) -> None:
    """Give kept programs the times of use that JAX's limit of a folder's size asks for.

    A process that was killed or knew no such limit wrote none, and JAX would keep nothing more.
    """
    for program in folder.glob("*-cache"):
        time = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(OSError):  # another process removed it, or may alone write here
            if not time.exists():
                time.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def _processor() -> str:
    """Name this machine's kind of processor: programs compiled for another one may crash here."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
