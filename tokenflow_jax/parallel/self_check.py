"""The check that a kernel passes before it is used by default on a kind of device."""

import concurrent.futures
from collections.abc import Callable

from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line


def passes(name: str, difference: Callable[[], float], tolerance: float) -> bool:
    """Return True if a kernel agrees with its plain form on this machine; warn if it does not.

    `difference` runs both and returns by how much they differ. A program may be being traced
    meanwhile. Whoever asks keeps the answer: a process checks once.
    """
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as apart:  # from a program being traced
            worst = apart.submit(difference).result()
        problem = "" if worst < tolerance else f"its results are off by {worst:.2g}"
    except Exception as error:  # what a compiler or a device says
        problem = one_line(error)
    if problem:
        log.warning("%s is not used here: %s", name, problem)
    return not problem
