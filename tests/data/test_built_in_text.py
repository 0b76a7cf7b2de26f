"""The text tokenizers that need no file."""

import pytest

from tokenflow_jax.data.built_in_text import BUILT_IN, ByteTokenizer, WordsAndBytes, WordTokenizer
from tokenflow_jax.data.text import PromptEncoder


@pytest.mark.parametrize(
    "prompt", ["red apple", "", "赤いリンゴ 🍎", "تفاحة", "a\x00b\n", "<s></s><img>"]
)
def test_bytes_survive(prompt):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(prompt)
    assert ids[0] == 1 and all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    assert tokenizer.decode(ids) == "<s>" + prompt
    assert tokenizer.encode(prompt, add_special_tokens=False) == ids[1:]


def test_broken_text_and_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800"), skip_special_tokens=True) == "a?"
    assert tokenizer.decode(tokenizer.encode("é")[:2], skip_special_tokens=True) == "\ufffd"
    with pytest.raises(ValueError, match="id 259 is not one of"):
        tokenizer.decode([259])


def test_words():
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("Red apple, 赤い")
    assert ids[0] == 1 and len(ids) == 5 and max(ids) < len(tokenizer)
    assert ids == tokenizer.encode("red  APPLE , 赤い")
    assert ids[1:3] == tokenizer.encode("red apple", add_special_tokens=False)
    assert tokenizer.decode([0, 1, ids[1], 2], skip_special_tokens=True) == f"#{ids[1]}"
    encoder = PromptEncoder(tokenizer, 6)
    assert len(encoder.open_ids) == len(encoder.close_ids) == 1
    assert list(encoder.encode("red apple")[:6]) == [0, 0, 0, *ids[:3]]
    # Saved models depend on these ids.
    assert tokenizer.encode("red apple <img>") == [1, 2721, 3851, 2147]


@pytest.mark.parametrize(
    "text",
    [
        "red apple", "", " red", "Red apple", "red  apple", "McDonald", "ID button",
        "USER: <image>\nWhat is this? ASSISTANT: a dog</s>", "<img>red</img> apple <img>",
        "赤いリンゴ 🍎", "a\x00b\n", "(apple)apple-Apple", "APPLE", "12 apples", "<s></s><img>",
    ],
)  # fmt: skip
def test_words_and_bytes_come_back(text):
    tokenizer = WordsAndBytes()
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_words_and_bytes_are_short_and_fixed():
    tokenizer = WordsAndBytes()
    assert tokenizer.decode([256 + 3], skip_special_tokens=True) == ""  # a sign without its word
    with pytest.raises(ValueError, match=f"id {len(tokenizer)} is not one of"):
        tokenizer.decode([len(tokenizer)])
    # Saved models depend on these ids.
    assert len(tokenizer) == 2318
    assert tokenizer.encode("a red apple <img>") == [1, 259, 299, 1724, 345, 35, 261]
    assert tokenizer.encode("Red")[1:] == [259, 260, 1724]
    assert tokenizer.encode("zqx") == [1, *(byte + 3 for byte in b"zqx")]
    assert tokenizer.encode("a\ud800") == [1, 259, 299, ord("?") + 3]


@pytest.mark.parametrize("kind", BUILT_IN.values())
@pytest.mark.parametrize("past_the_end", [True, False])
def test_ids_of_another_tokenizer_are_refused(kind, past_the_end):
    tokenizer = kind()
    with pytest.raises(ValueError, match=f"not one of the text tokenizer {kind.name_or_path}"):
        tokenizer.decode([5, len(tokenizer) if past_the_end else -1])
