"""Write the words of the text tokenizer `words_and_bytes`, of the emoji that train.

    python -m tools.shipped.words > tokenflow_jax/assets/words.txt

Models know words by their place in this file: change it only together with all that were trained.
"""

import collections
import re

from tokenflow_jax.data.chat import emoji
from tokenflow_jax.data.sources import open_source

_LEAST = 2  # emoji that have a word among their tags only
_SPOKEN = "USER ASSISTANT yes no"  # by templates, and of answers


def words() -> list[str]:
    """Return the words of names, questions and answers, and those that tags share, sorted."""
    names, tags = set(), collections.Counter()
    for example in open_source("emoji", "", "train"):
        names |= _words(example["caption"])
        tags.update(_words(" ".join(example.get("tags") or [])))
        asked = [ask(example, [example])[0] for ask in emoji.QUESTIONS.values()]
        names |= _words(" ".join(asked))
    names |= _words(" ".join([*emoji.KINDS, _SPOKEN]))
    names |= {word for word, count in tags.items() if count >= _LEAST}
    # A word's capitalized form needs no place of its own.
    return sorted(w for w in names if _lower(w) == w or _lower(w) not in names)


def _lower(word: str) -> str:
    return word[:1].lower() + word[1:]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text))


if __name__ == "__main__":
    print("\n".join(words()))
