"""Captions drawn from the texts of a picture."""

import numpy as np
import pytest

from tokenflow_jax.data.captions.texts import CaptionConfig, draw_caption
from tokenflow_jax.data.examples import Broken

VARIED = CaptionConfig(("{caption}", "{caption}, {tags}", "{tags}", "{group}: {caption}"))
PLAIN = CaptionConfig()
APPLE = {"name": "a", "caption": "red apple", "tags": ["fruit", "red", "ripe"], "group": 3}


def test_templates_make_several_captions_of_a_picture():
    rng = np.random.default_rng(0)
    drawn = {draw_caption(APPLE, VARIED, rng) for _ in range(300)}
    assert {"red apple", "red apple, fruit", "ripe, red", "food drink: red apple"} <= drawn
    assert max(map(len, drawn)) <= len("red apple, fruit, ripe")
    rest = {"name": "b", "caption": "thing"}
    assert {draw_caption(rest, VARIED, rng) for _ in range(30)} == {"thing"}
    several = {"name": "c", "caption": "x", "captions": ["x", "y"]}
    assert {draw_caption(several, PLAIN, rng) for _ in range(30)} == {"x", "y"}
    with pytest.raises(Broken, match="no caption"):
        draw_caption({"name": "d", "tags": []}, VARIED, rng)


def test_drop_rate_leaves_captions_out():
    rng, config = np.random.default_rng(0), CaptionConfig(drop_rate=0.25)
    empty = sum(draw_caption(APPLE, config, rng) == "" for _ in range(2000))
    assert 430 < empty < 570
    assert not any(draw_caption(APPLE, PLAIN, rng) == "" for _ in range(200))


def test_all_bad_templates_are_named():
    with pytest.raises(ValueError, match=r"'a cat' must(.|\n)*'\{color\}' must(.|\n)*drop_rate 2"):
        CaptionConfig(("a cat", "{color}", "{caption}"), drop_rate=2)
    with pytest.raises(ValueError, match="there is no template"):
        CaptionConfig(())
    with pytest.raises(ValueError, match="must name some of"):
        CaptionConfig(("{caption",))


def test_words_of_captions_and_tags_come_in_any_order():
    rng, config = np.random.default_rng(0), CaptionConfig(("{words}",))
    eyes = {"name": "e", "caption": "face with heart-eyes", "tags": ["in love", "face"]}
    drawn = [draw_caption(eyes, config, rng).split() for _ in range(500)]
    words = {"face", "with", "heart-eyes", "in", "love"}
    assert {*map(len, drawn)} == {1, 2, 3, 4, 5} and {w for d in drawn for w in d} == words
    assert all(len({*d}) == len(d) for d in drawn)
    firsts = [d[0] for d in drawn]
    assert min(firsts.count(w) for w in words) > 60
    others = {"name": "o", "caption": "हिन्दी, (C++) cafe\u0301!"}
    drawn = {word for _ in range(200) for word in draw_caption(others, config, rng).split()}
    assert drawn == {"हिन्दी", "C++", "cafe\u0301"}
    many = {"name": "m", "caption": "a b c d e f g h"}
    assert max(len(draw_caption(many, config, rng).split()) for _ in range(200)) == 5
    with pytest.raises(Broken, match="no caption"):
        draw_caption({"name": "s", "caption": "?!"}, config, rng)
