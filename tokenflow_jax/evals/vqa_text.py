"""The official normalization of answers to visual questions (VQA v2's evaluation code).

It drops punctuation and articles, turns number words into digits and restores apostrophes.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_DIGITS.split())} | {"none": "0"}
# The official table maps a word without one of these apostrophes to the whole word.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize(answer: str) -> str:
    """Return an answer in the form in which answers are compared."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    original, comma = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        answer = answer.replace(mark, "" if beside_space or comma else " ")
    answer = _PERIOD.sub("", answer)
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """Return the agreement with people's answers, 0 to 1; one reference counts as exact match."""
    # The mean over leaving out each of the (usually ten) references: three others that agree are
    # enough. The official code does not normalize when all references are the same; this always
    # does.
    if not references:
        raise ValueError("VQA accuracy needs at least one reference answer")
    own, others = normalize(answer), [normalize(reference) for reference in references]
    if len(others) == 1:
        return float(own == others[0])
    matches = [reference == own for reference in others]
    scores = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(scores) / len(scores)
