"""The prefetcher: order, positions, errors."""

import threading
import time

import jax
import numpy as np
import pytest

from tokenflow_jax.parallel import mesh
from tokenflow_jax.train.prefetch import DevicePrefetcher


class Counter:
    """Counts up in batches of two; its position is the next number."""

    def __init__(self, end=None):
        self.next, self.end = 0, end

    def __next__(self):
        if self.next == self.end:
            raise StopIteration
        self.next += 1
        return {"x": np.full((2, 3), self.next - 1, np.int32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, states):
        (state,) = states
        self.next = state["next"]


def prefetch(iterator, depth=2):
    return DevicePrefetcher(iterator, mesh.batch_sharding(mesh.make_mesh()), depth)


def test_batches_come_in_order_and_on_the_device():
    data = prefetch(Counter())
    for expected in range(6):
        batch = next(data)
        assert isinstance(batch["x"], jax.Array)
        np.testing.assert_array_equal(batch["x"], expected)
    data.close()


def test_the_position_is_that_of_the_batches_handed_out():
    source = Counter()
    data = prefetch(source, depth=3)
    assert data.get_state() == {"next": 0}
    next(data), next(data)
    while source.next < 5:  # the thread has run ahead
        time.sleep(0.01)
    position = data.get_state()
    assert position == {"next": 2}
    data.close()
    again = prefetch(Counter())
    again.set_state([position])
    assert again.get_state() == position
    np.testing.assert_array_equal(next(again)["x"], 2)
    again.close()


def test_an_error_of_the_source_reaches_the_caller_each_time():
    data = prefetch(Counter(end=1))
    next(data)
    for _ in range(2):
        with pytest.raises(ValueError, match="repeat it forever"):
            next(data)
    data.close()


def test_text_in_a_batch_is_refused():
    class Texts(Counter):
        def __next__(self):
            return {"text": np.array(["a", "b"])}

    data = prefetch(Texts())
    with pytest.raises(ValueError, match="numbers only"):
        next(data)
    data.close()


def test_close_ends_the_thread_even_when_the_queue_is_full():
    others = set(threading.enumerate())
    data = prefetch(Counter(), depth=1)
    next(data)
    time.sleep(0.05)
    data.close()
    assert set(threading.enumerate()) <= others
