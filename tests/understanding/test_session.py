"""A conversation whose cache is kept gives the tokens of one that is read anew."""

import functools

import jax
import numpy as np
import pytest
from tiny_reader import CONFIG

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.understanding.answer import Decoding, answer, read, step
from tokenflow_jax.understanding.model import Understanding
from tokenflow_jax.understanding.session import Session

MODEL, VECTORS = Understanding(CONFIG), 4
HOW = Decoding(6, (), 0)
RNG = np.random.default_rng(0)
PICTURES = [RNG.normal(size=(VECTORS, 9)).astype(np.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def params():
    # Larger than at initialization, so that tokens decide on what follows.
    params = jax.jit(MODEL.init_params)(jax.random.key(1))
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def compiled():
    names = ("decoding", "room")
    return {
        "read": jax.jit(functools.partial(read, MODEL), static_argnames=names, donate_argnums=2),
        "step": jax.jit(
            functools.partial(step, MODEL), static_argnames="decoding", donate_argnames="state"
        ),
    }


class Counted(Session):
    """A session that notes how many tokens and pictures it reads."""

    def __init__(self, compiled, params):
        self.reads = []

        def reader(*arguments, **options):
            self.reads.append((int(arguments[4]), self.shown))
            return compiled["read"](*arguments, **options)

        super().__init__({**compiled, "read": reader}, params, VECTORS, self.features)

    def features(self, rows):
        (pictures,) = rows
        self.shown = len(pictures)
        own = np.stack(pictures) if pictures else np.zeros((1, VECTORS, 9), np.float32)
        return own[None]

    def ids(self, row, pictures, how=HOW):
        return [ids_N for ids_N, _ in self.tokens(row, pictures, how, 0)][-1].tolist()


def row_of(*tokens):
    """The row of ids, in which "p" is a picture."""
    ids = [-200 if token == "p" else int(token) for token in tokens]
    return insertion.merge_row(np.array(ids), None, VECTORS)


def anew(compiled, params, row, pictures, how=HOW):
    """Without what was read before; a batch read at once gives the same."""
    found = Counted(compiled, params).ids(row, pictures, how)
    prompt = insertion.pad_rows([row], 160, "left")
    del prompt["labels"]
    features = np.stack(pictures) if pictures else np.zeros((1, VECTORS, 9), np.float32)
    prompt["features"] = features[None]
    ids_BN = jax.jit(functools.partial(answer, MODEL), static_argnames="decoding")(
        params, prompt, jax.random.key(0), decoding=how
    )
    assert ids_BN[0].tolist() == found
    return found


def test_only_what_is_new_is_read(compiled, params):
    session = Counted(compiled, params)
    begin = [7, "p", 8, 9, 10, 11, 12]
    first = session.ids(row_of(*begin), PICTURES[:1])
    assert first == anew(compiled, params, row_of(*begin), PICTURES[:1])
    turn = [*begin, *first, 13, "p", 14]
    second = session.ids(row_of(*turn), PICTURES[:2])
    assert second == anew(compiled, params, row_of(*turn), PICTURES[:2])
    more = [*turn, *second, 15, 16]
    assert session.ids(row_of(*more), PICTURES[:2]) == anew(
        compiled, params, row_of(*more), PICTURES[:2]
    )
    # The first turn; the second one's own tokens and picture; the third one's.
    assert session.reads == [(6 + VECTORS, 1), (2 + VECTORS, 1), (2, 0)]


def test_the_cache_grows(compiled, params):
    session, turn = Counted(compiled, params), [7, "p", 8]
    for length in (90, 130, 60):
        turn = [*turn, *RNG.integers(1, 40, length)]
        # `anew` reads at most 160 tokens at once.
        found = session.ids(row_of(*turn), PICTURES[:1])
        assert found == Counted(compiled, params).ids(row_of(*turn), PICTURES[:1])
        turn += found
    assert [count for count, _ in session.reads] == [92 + VECTORS, 130, 60]


@pytest.mark.parametrize("place", [0, 3, 9])
def test_a_history_that_was_changed_is_read_from_there(compiled, params, place):
    session = Counted(compiled, params)
    begin = [7, "p", 8, 9, 10, 11, 12, 13, 14, 15]
    session.ids(row_of(*begin), PICTURES[:1])
    begin[place] = 33
    found = session.ids(row_of(*begin), PICTURES[:1])
    assert found == anew(compiled, params, row_of(*begin), PICTURES[:1])
    assert session.reads[1][0] == len(begin) - place + (VECTORS - 1 if place == 0 else 0)


def test_another_picture_in_the_same_place_is_read(compiled, params):
    session, row = Counted(compiled, params), row_of(7, "p", 8, 9)
    one = session.ids(row, PICTURES[:1])
    assert session.ids(row, PICTURES[1:2]) == anew(compiled, params, row, PICTURES[1:2])
    assert session.reads[1] == (3 + VECTORS, 1)
    assert session.ids(row, PICTURES[:1]) == one


def test_an_answer_that_nobody_waited_for(compiled, params):
    session, row = Counted(compiled, params), row_of(7, "p", 8, 9)
    next(session.tokens(row, PICTURES[:1], HOW, 0))
    turn = row_of(7, "p", 8, 9, 10, 11)
    assert session.ids(turn, PICTURES[:1]) == anew(compiled, params, turn, PICTURES[:1])
