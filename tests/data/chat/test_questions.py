"""Questions of conversations and the texts of their answers."""

import numpy as np

from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.chat import questions


def test_ids_that_the_text_tokenizer_lacks_are_left_out():
    """Tables of published models have more rows than their tokenizers ids."""
    ids = [*ByteTokenizer().encode("red", add_special_tokens=False), 272, 2]
    assert questions.answer_text(ByteTokenizer(), np.array(ids), (2,)) == "red"
