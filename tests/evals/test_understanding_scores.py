"""Scores of answers: the official normalization, and counts done by hand."""

import time

import pytest

from tokenflow_jax.evals import understanding_scores as scores
from tokenflow_jax.evals.vqa_text import normalize, vqa_accuracy


@pytest.mark.parametrize(
    "text, want",
    [
        ("The  Red, car!", "red car"),
        ("two dogs.", "2 dogs"),
        ("None", "0"),
        ("10,000", "10000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yes/no", "yes no"),
        ("a-b - c", "ab c"),  # one mark beside a space: all of its kind go without trace
        ("somebody'd", "somebodyd"),
        ("an apple\n", "apple"),
    ],
)
def test_normalization(text, want):
    assert normalize(text) == want


@pytest.mark.parametrize("count, want", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_vqa_accuracy(count, want):
    """Ten people: leaving out one of those that agree costs a third of a tenth each."""
    references = ["Cat."] * count + [f"dog {i}" for i in range(10 - count)]
    assert vqa_accuracy("the cat", references) == pytest.approx(want)


def test_vqa_reads_the_published_forms():
    forms = [
        {"answers": [{"answer": "2"}, {"answer": "two"}, {"answer": "2"}, {"answer": "2"}]},
        {"answers": ["2"] * 4}, {"answer": "two"}, {"label": 2},
    ]  # fmt: skip
    assert scores.score_vqa(forms, ["2"] * 4) == {"vqa_accuracy": 1.0}
    assert scores.score_exact(forms, ["2", "3", "The 2", "two!"]) == {"exact_match": 0.75}
    with pytest.raises(ValueError, match="no answer"):
        scores.score_vqa([{"question": "x"}], ["y"])


@pytest.mark.parametrize(
    "text, want", [("Yes, there is.", "yes"), ("No.", "no"), ("There is not one. Yes", "no"),
                   ("Nothing", "yes"), ("", "yes")],
)  # fmt: skip
def test_reading_of_pope(text, want):
    assert scores.pope_answer(text) == want


def test_pope():
    """3 hits, 1 false alarm, 1 miss, 1 correct rejection."""
    labels = ["yes", "yes", "yes", "no", "yes", "no"]
    said = ["Yes.", "yes", "Yes it is", "Yes", "No", "no, it is not"]
    questions = [
        {"label": label, "category": "random" if i < 4 else "popular"}
        for i, label in enumerate(labels)
    ]
    figures = scores.score_pope(questions, said)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["precision"] == figures["recall"] == figures["f1"] == pytest.approx(3 / 4)
    assert figures["yes_rate"] == pytest.approx(4 / 6)
    assert figures["random/recall"] == 1.0 and figures["popular/precision"] == 0.0
    with pytest.raises(ValueError, match="yes or no"):
        scores.score_pope([{"label": "perhaps"}], ["yes"])


def test_mme():
    """Two questions per picture; acc+ wants both right; sums over the published categories."""
    questions = [
        {"category": c, "image": image, "question": "?", "answer": answer}
        for c in ("existence", "code_reasoning")
        for image in ("a.png", "b.png")
        for answer in ("Yes", "No")
    ]
    figures = scores.score_mme(questions, ["yes", "no", "Yes.", "Yes", "n", "no", "Noo", "maybe"])
    assert figures["existence/accuracy"] == 0.75 and figures["existence/accuracy_plus"] == 0.5
    assert figures["existence/score"] == figures["perception"] == 125.0
    assert figures["code_reasoning/accuracy"] == 0.25 and figures["cognition"] == 25.0


OPTIONS = {"A": "a cat", "B": "a red dog", "C": "a dog"}


@pytest.mark.parametrize(
    "text, want",
    [("B", "B"), ("(b)", "B"), ("C. a dog", "C"), ("A: because", "A"), ("Answer: B.", "B"),
     ("Cat", "A"), ("a dog", "C"), ("it is a cat", "A"), ("a bird", None), ("", None),
     ("cat or a dog", None), ("A dog", "C"), ("A red dog.", "B"), ("A bird", None),
     ("B because", "B"), ("A", "A"), ("A\n", "A")],
)  # fmt: skip
def test_reading_of_a_choice(text, want):
    assert scores.choice_of(text, OPTIONS) == want


@pytest.mark.parametrize(
    ("text", "options", "want"),
    [
        ("12", ["1", "5"], None), ("1350", ["135", "140"], None), ("woman", ["man", "dog"], None),
        ("3", ["-3", "5"], None), ("-3", ["3", "5"], None), ("it is -3", ["3", "-3"], "B"),
        ("\u22123.", ["3", "-3"], "B"),
        ("1.5", ["1", "5"], None), ("it is 1.5.", ["1", "1.5"], "B"),
        ("3/4", ["3", "5"], None), ("3rd", ["3", "5"], None), ("v1.5", ["v1", "x"], None),
        ("5 - 3", ["5", "7"], None), ("5 - 3", ["5+3", "5-3"], "B"),
        ("y = x-3", ["x+3", "x - 3"], "B"),
        ("+", ["-", "x"], None), ("+", ["-", "+"], "B"), ("< 5", ["> 5", "x"], None),
        ("< 5", ["5", "x"], None), ("<= 5", ["5", "<5"], None), ("x = 5", ["5", "7"], "A"),
        ("", ["?", "dog"], None), ("", ["", "dog"], None), ("?", ["?", "dog"], "A"),
        ("...", ["the", "dog"], None), ("I do not know", [".", "dog"], None),
        ("I do not know", list("zyxwvutsr"), None), ("I. r", list("zyxwvutsr"), "I"),
        ("**5**", ["3", "5"], "B"), ("about 1,350 of them", ["135", "1350"], "B"),
        ("$5", ["5", "6"], "A"),
        ("a Two-Year old", ["one year", "2 year old"], "B"), ("it\u2019s", ["its", "it's"], "B"),
        ("\u56fe\u4e2d\u662f\u72d7\u3002", ["\u732b", "\u72d7"], "B"),
        ("\u212a. x", list("abcdefghijk"), None),
    ],
)  # fmt: skip
def test_a_text_matches_whole_words_and_numbers_with_their_signs(text, options, want):
    assert scores.choice_of(text, dict(zip("ABCDEFGHIJK", options, strict=False))) == want


def test_numbers_as_keys_of_options():
    assert scores.choice_of("1.5", {"1": "cat", "2": "dog"}) is None
    assert scores.choice_of("1. cat", {"1": "cat", "2": "dog"}) == "1"


@pytest.mark.parametrize("part", ["1", "-", " ", "- ", "1-", "1 ", "1,", "a'", "A", "(", ".", "<="])
def test_long_answers_are_read_in_linear_time(part):
    start = time.monotonic()
    assert scores.choice_of(part * 50_000 + "x", OPTIONS) is None
    assert time.monotonic() - start < 5


def test_choice_in_the_published_forms():
    questions = [
        {"question": "q", "options": OPTIONS, "answer": "B"},
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"question": "q", "hint": "h", "A": "u", "B": "v", "C": "nan", "answer": "A"},
        {"question": "q", "options": ["x", "y"], "answer": "y"},
        {"question": "q", "choice_a": "x", "choice_b": "y", "answer": "B"},
        {"question": "q", "options": "['x', \"y's\"]", "answer": "B"},
    ]
    figures = scores.score_choice(questions, ["B", "B", "B.", "neither", "y", "y's"])
    assert figures == pytest.approx({"accuracy": 4 / 6, "unclear": 1 / 6})
    for bad in ({"question": "q"}, {"question": "q", "options": "x or y"}):
        with pytest.raises(ValueError, match="options"):
            scores.options_of(bad)
    prompt = scores.TASKS["choice"].prompt(questions[2])
    assert prompt.splitlines()[:-1] == ["h", "q", "A. u", "B. v"]
    assert scores.TASKS["pope"].prompt({"text": "<image>\nA cat?"}, "") == "A cat?"


@pytest.mark.parametrize(
    ("options", "truth", "answer", "right"),
    [
        (["1", "2", "3", "4"], "3", "3", True),
        (["1", "2", "3", "4"], "3", "D", False),
        (["135", "140", "145", "150"], "140", "B", True),
        (["135", "140", "145", "150"], "140", "140", True),
        (["cat", "dog", "cow"], 1, "dog", True),  # a place, as in ScienceQA
        (["one", "1", "2"], "1", "1", True),  # one option after normalization, two before
        (["-1", "5"], 1, "B", True),
        (["-1", "5"], 1, "-1", False),
        ({"1+": "cat", "2(": "dog"}, "2(", "2(", True),  # keys that mean something in patterns
    ],
)
def test_numbers_among_the_options(options, truth, answer, right):
    question = {"question": "?", "options": options, "answer": truth}
    assert scores.score_choice([question], [answer])["accuracy"] == right


def test_a_right_answer_that_is_no_option_is_an_error():
    question = {"question": "?", "options": ["135", "140"], "answer": "7"}
    with pytest.raises(ValueError, match="'7' is none of the options"):
        scores.score_choice([question], ["nothing"])


@pytest.mark.parametrize("options", ["{[]: 1}", "(" * 100_000, "1", {}, []])
def test_options_that_are_none_are_a_short_error(options):
    with pytest.raises(ValueError, match="option") as error:
        scores.options_of({"question": "x" * 10**6, "options": options})
    assert len(str(error.value)) < 400


def test_more_than_ten_options_have_letters_and_more_than_letters_are_an_error():
    options = [f"picture {i}" for i in range(26)]
    for question in ({"options": options}, {f"choice_{'abcdefghijkl'[i]}": i for i in range(12)}):
        assert list(scores.options_of(question))[10:12] == ["K", "L"]
    assert scores.options_of({"options": options})["Z"] == "picture 25"
    question = {"question": "?", "options": options, "answer": 11}
    assert scores.score_choice([question], ["L"])["accuracy"] == 1
    with pytest.raises(ValueError, match=r"27 options, more than letters: \['picture 0'"):
        scores.options_of({"options": [*options, "one more"]})


def test_options_as_the_text_of_a_tuple():
    for text in (("x", "y"), "('x','y')", "['x', 'y']", " ('x', 'y',)\n"):
        assert scores.options_of({"options": text}) == {"A": "x", "B": "y"}
    assert scores.options_of({"options": "(1, 2.5)"}) == {"A": "1", "B": "2.5"}
    assert scores.options_of({"options": "{'A': 'x'}"}) == {"A": "x"}


@pytest.mark.parametrize(
    "text", ["('x')", "{'x', 'y'}", "['x', ['y']]", "('x', None)", f"[0x{'f' * 5000}]", "1", "b'x'",
             f"{{'A': 0x{'f' * 5000}}}", f"[{'1' * 5000}]", "()"],
)  # fmt: skip
def test_a_text_of_options_that_is_no_list_of_texts_is_named(text):
    with pytest.raises(ValueError, match="options"):
        scores.options_of({"options": text, "A": "u"} if text != "()" else {"options": text})


def test_numbers_of_many_digits_are_texts():
    long = "1" * 5000
    question = {"question": "?", "options": [long, "5"], "answer": long}
    assert scores.score_choice([question], [long]) == {"accuracy": 1, "unclear": 0}
    assert scores.score_choice([question], [long + "1"]) == {"accuracy": 0, "unclear": 1}
    with pytest.raises(ValueError, match=r"'111.*is none of the options") as error:
        scores.right_choice({"answer": long}, {"A": "x", "B": "y"})
    assert len(str(error.value)) < 600
    for name in ("vqa", "exact", "mme"):
        row = {"answer": long, "category": "OCR", "image": "x"}
        assert scores.TASKS[name].score([row], [long])
