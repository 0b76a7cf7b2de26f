"""Dealing one stream of batches to processes, and resuming with another number of them."""

import collections
import json

import numpy as np
import pytest

from tokenflow_jax.data.block_order import block_order
from tokenflow_jax.data.dealing import DealtBatches, NumberedBatches

COUNT = 20
BROKEN = frozenset({3, 4, 5, 11})


def make(index, rng):
    if index in BROKEN:
        return None
    return {"item": np.int32(index), "draw": np.float32(rng.random())}


def whole(index, rng):
    return {"item": np.int32(index), "draw": np.float32(rng.random())}


def deal(share=0, shares=1, batch_size=None, function=whole, seed=5):
    return DealtBatches(
        function,
        COUNT,
        batch_size=batch_size or 12 // shares,
        seed=seed,
        shard_index=share,
        shard_count=shares,
        identity={"data": "numbers"},
    )


def group(shares, **options):
    return [deal(i, shares, **options) for i in range(shares)]


def step(group):
    """Return the examples of one global batch, as (item, draw), unordered."""
    batches = [next(share) for share in group]
    pairs = [zip(b["item"].tolist(), b["draw"].tolist(), strict=True) for b in batches]
    return collections.Counter(pair for share in pairs for pair in share)


def states_of(group):
    return json.loads(json.dumps([share.get_state() for share in group]))


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_any_number_of_shares_makes_the_same_batches(shares):
    one, many = group(1), group(shares)
    for _ in range(6):
        expected, parts = next(one[0]), [next(share) for share in many]
        for key, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), array)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 3), (4, 2, 1, 3)])
def test_another_number_of_shares_resumes_exactly(numbers):
    """The same items and random draws as in an uninterrupted run, over several changes."""
    reference, current = group(1), group(numbers[0])
    for number in (*numbers[1:], numbers[0]):
        for _ in range(3):
            assert step(current) == step(reference)
        states = states_of(current)
        current = group(number)
        for share in current:
            share.set_state(states)
    assert step(current) == step(reference)


def test_the_same_number_of_shares_needs_only_its_own_states():
    before = group(2, function=make)
    for _ in range(4):
        step(before)
    after = group(2, function=make)
    for share, state in zip(after, states_of(before), strict=True):
        share.set_state(state)
    for _ in range(4):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(next(a)["draw"], next(b)["draw"])


@pytest.mark.parametrize("numbers", [(3, 2, 1), (2, 4, 3)])
def test_with_broken_items_nothing_is_lost_or_seen_twice(numbers):
    """Shares that met more broken items are further ahead; their places are not dealt again."""
    seen = []
    states = None
    for number in numbers:
        current = group(number, function=make)
        for share in current:
            if states is not None:
                share.set_state(states)
        for _ in range(5):
            seen += step(current).elements()
        states = states_of(current)
    assert len(seen) == len(set(seen)) == 12 * 5 * len(numbers)
    # All but the last few places of the stream were dealt, each once.
    stream = deal(batch_size=1, function=make)
    first = {
        (int(b["item"][0]), float(b["draw"][0]))
        for b in (next(stream) for _ in range(len(seen) - 12))
    }
    assert first <= set(seen)


def test_a_position_that_lacks_shares_is_refused():
    states = states_of(group(3))
    with pytest.raises(ValueError, match=r"lacks those of shares \[1\] of 3"):
        deal(shares=2).set_state([states[0], states[2]])
    with pytest.raises(ValueError, match="seed was 5 and is 6"):
        deal(seed=6).set_state(states)


def test_repeated_states_count_once():
    """Processes that share their rows of a batch save the same position."""
    before = group(2)
    step(before)
    states = states_of(before)
    after = deal()
    after.set_state([states[1], *states, *states])
    reference = deal()
    next(reference)
    assert step([after]) == step([reference])


def test_numbered_batches_resume_on_any_number_of_processes():
    def batches(**identity):
        return NumberedBatches(lambda n: {"n": np.int32(n)}, identity={"data": "a", **identity})

    before = batches()
    assert [int(next(before)["n"]) for _ in range(4)] == [0, 1, 2, 3]
    state = json.loads(json.dumps(before.get_state()))
    after = batches()
    assert int(next(after)["n"]) == 0
    after.set_state([state, state, state])
    assert [int(next(after)["n"]) for _ in range(2)] == [4, 5]
    with pytest.raises(ValueError, match="data was 'a' and is 'b'"):
        batches(data="b").set_state(state)


@pytest.mark.parametrize(
    ("count", "block", "window"),
    [(1000, 16, 128), (1, 5, 9), (97, 10, 10), (50, 64, 1), (64, 8, 99)],
)
def test_the_order_of_blocks(count, block, window):
    order = block_order(count, block, window, 7)
    passes = np.array([order(place) for place in range(3 * count)]).reshape(3, count)
    assert all(sorted(items) == list(range(count)) for items in passes)
    again = block_order(count, block, window, 7)
    assert [again(place) for place in reversed(range(3 * count))] == passes.ravel()[::-1].tolist()
    if count > 10:
        other = [block_order(count, block, window, 8)(place) for place in range(count)]
        assert all((passes[0] != items).any() for items in (passes[1], passes[2], other))


def test_windows_of_the_order_need_few_runs_of_neighbours():
    count, block, window = 10_000, 50, 500
    order = block_order(count, block, window, 0)
    for first in range(0, count - window, window):
        items = np.sort([order(place) for place in range(first, first + window)])
        runs = 1 + np.sum(np.diff(items) > 1)
        assert runs <= window // block + 1  # one more where the last item meets the first
    jumps = np.abs(np.diff([order(place) for place in range(count)]))
    assert np.mean(jumps > block) > 0.85, "neighbours do not follow each other"


def test_a_position_holds_the_order_of_blocks():
    plain = deal()
    assert plain.get_state()["stream"]["shuffle_block"] == 0
    before = plain.get_state()
    del before["stream"]["shuffle_block"]
    deal().set_state(before)  # from before there were blocks
    blocks = DealtBatches(
        whole, COUNT, batch_size=4, seed=5, identity={"data": "numbers"}, shuffle_block=4
    )
    with pytest.raises(ValueError, match=r"shuffle_block was 0 and is \[4, 1\]"):
        blocks.set_state(before)
    with pytest.raises(ValueError, match=r"shuffle_block was \[4, 1\] and is 0"):
        deal().set_state(blocks.get_state())
