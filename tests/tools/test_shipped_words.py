"""The words of the text tokenizer `words_and_bytes`: saved models know them by their places."""

from tokenflow_jax.data.built_in_text import WordsAndBytes
from tools.shipped.words import words


def test_the_shipped_words_are_those_of_the_emoji_that_train():
    found = words()
    tokenizer = WordsAndBytes()
    assert len(tokenizer) == 3 + 256 + 2 + 2 + len(found) and "apple" in found
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in found]
    assert ids == [[3 + 256 + 4 + place] for place in range(len(found))]
