"""Somebody who still writes into a folder, as TensorStore's threads do after a failed save."""

import contextlib
import itertools
import pathlib
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def writing(folder: pathlib.Path, seconds: float) -> Iterator[None]:
    """Files keep appearing in the folder, which is made again if it goes, for some seconds."""
    folder.mkdir(parents=True)
    for number in range(300):  # enough for its removal to take a while
        (folder / f"before{number}").touch()
    end = time.monotonic() + seconds

    def write():
        for number in itertools.count():
            if time.monotonic() > end:
                return
            # Removed between two calls; also inside mkdir, which then says that it exists.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(number)).touch()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join()
