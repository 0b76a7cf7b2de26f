"""Questions and the pictures that they bring."""

import numpy as np
from PIL import Image

from tokenflow_jax.understanding.chat import as_list, human_turn


def test_half_a_surrogate_pair_reaches_no_text_tokenizer():
    assert human_turn("a\ud83d <image>?", 0)[1] == "a? ?"


def test_a_question_may_bring_several_pictures():
    """One of any kind is one; lists, generators and batches are several."""
    one, batch = Image.new("RGB", (8, 8)), np.zeros((2, 8, 8, 3), np.uint8)
    for single in ("a.png", b"data", one, batch[0]):
        assert as_list(single)[0] is single and len(as_list(single)) == 1
    for several in ([one, "a.png"], (one, one), iter([one, one]), batch):
        assert len(as_list(several)) == 2
    assert as_list(None) == []
