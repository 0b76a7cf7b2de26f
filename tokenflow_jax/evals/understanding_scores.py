"""Scores of answers about pictures, as the benchmarks publish them.

A task reads questions (dicts, one per line of its file) and answers (texts), and returns figures
from 0 to 1, except MME's, which are out of 200 per category.
"""

import ast
import dataclasses
import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenflow_jax.evals.vqa_text import normalize, vqa_accuracy
from tokenflow_jax.messages import shown

Question = Mapping[str, Any]

_MME = {  # parts of MME -> their categories
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}
_LETTERS = string.ascii_uppercase
_DASHES = str.maketrans("\u2212\u2013\u2019", "--'")  # minus, en dash and apostrophe of typesetting
_SPACELESS = re.compile("([\u3040-\u30ff\u3400-\u9fff])")  # of Chinese and Japanese, a word each
_HYPHEN = re.compile(r"(?<=\w)-(?=[^\W\d])")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))|\s")
# Sums and comparisons of numbers are one token; no part can match in two ways, so none is slow.
_TOKEN = re.compile(
    r"""
    (?P<number> (?: [-+\u00b1<>\u2264\u2265\u2260]=?\s* ){0,2} \.?\d
        (?: \w | [.,:](?=\d) | \s*[-+*/^<>\u00d7\u00f7]\s*(?=\.?\d) )* )
    | (?P<word> \w (?: \w | '(?=\w) | [.,:/](?=\d) )* )
    | [^\w\s.,;:!?"'()\[\]{}/\\@`\u2018\u201c\u201d\u2026\u3001\u3002\uff01\uff0c\uff1f]
    """,
    re.VERBOSE,
)


def references_of(question: Question) -> list[str]:
    """Return the right answers: `answers` (texts, or VQA's dicts), `answer` or `label`."""
    found = question.get("answers", question.get("answer", question.get("label")))
    found = found if isinstance(found, list) else [found]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in found]
    if not texts or any(text is None for text in texts):
        raise ValueError(f"no answer to compare with in {shown(dict(question))}")
    return [str(text) for text in texts]


def score_vqa(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the mean of `vqa_text.vqa_accuracy`."""
    pairs = zip(questions, answers, strict=True)
    return {"vqa_accuracy": _mean([vqa_accuracy(a, references_of(q)) for q, a in pairs])}


def score_exact(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of answers that equal a reference, after VQA's normalization."""
    pairs = zip(questions, answers, strict=True)
    right = [normalize(a) in map(normalize, references_of(q)) for q, a in pairs]
    return {"exact_match": _mean(right)}


def pope_answer(answer: str) -> str:
    """Read a text as "yes" or "no" by its first sentence, as POPE does."""
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, precision, recall, F1 and share of "yes"; also per `category`."""
    rows = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        truth = references_of(question)[0].strip().lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"POPE's label must be yes or no, not {shown(truth)}")
        row = truth == "yes", pope_answer(answer) == "yes"
        rows[""].append(row)
        if question.get("category"):
            rows[f"{question['category']}/"].append(row)
    return {f"{part}{name}": v for part, r in rows.items() for name, v in _yes_figures(r).items()}


def _yes_figures(rows: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    right = sum(truth == said for truth, said in rows)
    hits = sum(truth and said for truth, said in rows)
    said, true = sum(s for _, s in rows), sum(t for t, _ in rows)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    both = precision + recall
    return {
        "accuracy": right / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_rate": said / len(rows),
    }


def mme_answer(answer: str) -> str:
    """Read a text as "yes", "no" or "other" by its beginning, as MME does."""
    answer = answer.strip().lower()
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return 100 x (accuracy + accuracy+) per category, and sums over perception and cognition."""
    rows: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in zip(questions, answers, strict=True):
        if "category" not in question or "image" not in question:
            raise ValueError(f"MME needs category and image: {shown(dict(question))}")
        right = mme_answer(answer) == mme_answer(references_of(question)[0])
        rows[str(question["category"])][str(question["image"])].append(right)
    figures = {}
    for category, pictures in rows.items():
        accuracy = _mean([right for answers in pictures.values() for right in answers])
        plus = _mean([all(answers) for answers in pictures.values()])  # both questions right
        figures |= {
            f"{category}/accuracy": accuracy,
            f"{category}/accuracy_plus": plus,
            f"{category}/score": 100 * (accuracy + plus),
        }
    for name, categories in _MME.items():
        if parts := [figures[f"{c}/score"] for c in categories.split() if c in rows]:
            figures[name] = sum(parts)
    return figures


def _plain_options(found: Any) -> dict[str, str] | list[str]:
    """Return a dict, list or tuple of texts or numbers with texts only."""
    if isinstance(found, Mapping):
        return dict(zip(map(str, found), _plain_options(list(found.values())), strict=True))
    plain = isinstance(found, list | tuple) and all(isinstance(x, str | int | float) for x in found)
    if not plain:
        raise TypeError
    return [str(item) for item in found]


def options_of(question: Question) -> dict[str, str]:
    """Return letter -> text of the options; ValueError if there are none."""
    # A list, a dict or the text of a list (MMMU); or keys A, ... (MMBench), choice_a (SEED-Bench).
    found = question.get("options", question.get("choices"))
    if isinstance(found, str):
        try:
            found = _plain_options(ast.literal_eval(found.strip()))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(f"options {shown(found)} are not a list of texts") from error
    if isinstance(found, Mapping) and found:
        return {str(letter): str(text) for letter, text in found.items()}
    if isinstance(found, list | tuple) and found:
        if len(found) > len(_LETTERS):
            raise ValueError(f"{len(found)} options, more than letters: {shown(found)}")
        return {letter: str(text) for letter, text in zip(_LETTERS, found, strict=False)}
    texts = {}
    for letter in _LETTERS:
        text = question.get(letter, question.get(f"choice_{letter.lower()}"))
        if text not in (None, "", "nan"):
            texts[letter] = str(text)
    if texts:
        return texts
    raise ValueError(f"no options in {shown(dict(question))}")


def _form(text: str) -> str:
    """Return the words, numbers and signs of a text as options are compared, a space between."""
    text = _HYPHEN.sub(" ", _SPACELESS.sub(r" \1 ", text.lower().translate(_DASHES)))
    tokens = []
    for found in _TOKEN.finditer(text):
        if found["number"]:
            tokens.append(_THOUSANDS.sub("", found[0]))
        else:
            tokens.append(normalize(found[0]) if found["word"] else found[0])
    return " ".join(filter(None, tokens))


def choice_of(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of an answer: an option's text, a letter in front, or a text inside."""
    answer = answer.strip()
    own, forms = _form(answer), {letter: _form(text) for letter, text in options.items()}
    stripped = {letter: text.strip() for letter, text in options.items()}
    for mine, texts in ((answer, stripped), (own, forms)):  # "1" is not "one" where both are
        equal = [letter for letter, text in texts.items() if mine and text == mine]
        if len(equal) == 1:
            return equal[0]
    letters = {letter.upper(): letter for letter in options}
    keys = "|".join(map(re.escape, sorted(letters, key=len, reverse=True)))
    # "1.5" is not option 1.
    pattern = rf"(?:answer:?\s*)?\(?({keys})(?!(?<=\d)[.,:]\d)([).:,\s]|$)"
    found = re.match(pattern, answer, re.IGNORECASE)
    # "A dog" is not A, nor "I see" I: such a capital before a word is taken for a word.
    alone = answer.upper() in letters or answer.strip("().:,").upper() in letters
    if found and (alone or (found[1].isupper() and found[1] + found[2] not in ("A ", "I "))):
        return letters.get(found[1].upper())  # None: Unicode has letters that only look the same
    inside = [letter for letter, text in forms.items() if text and f" {text} " in f" {own} "]
    return inside[0] if len(inside) == 1 else None


def right_choice(question: Question, options: Mapping[str, str]) -> str:
    """Return the letter of the right option, given as its text, its letter or its place from 0."""
    truth = references_of(question)[0].strip()
    choice = choice_of(truth, options)
    if choice is None:  # as ScienceQA
        choice = {str(place): letter for place, letter in enumerate(options)}.get(truth)
    if choice is None:
        raise ValueError(f"the right answer {shown(truth)} is none of the options {shown(options)}")
    return choice


def score_choice(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the shares of right options and of answers that mean no option."""
    right, unclear = [], []
    for question, answer in zip(questions, answers, strict=True):
        options = options_of(question)
        choice = choice_of(answer, options)
        right.append(choice == right_choice(question, options))
        unclear.append(choice is None)
    return {"accuracy": _mean(right), "unclear": _mean(unclear)}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def question_text(question: Question) -> str:
    """Return `question` or `text`, without LLaVA's marker."""
    for key in ("question", "text"):
        if isinstance(question.get(key), str):
            return question[key].replace("<image>", "").strip()
    raise ValueError(f"no question in {shown(dict(question))}")


def choice_text(question: Question) -> str:
    """Return the question, its hint and its options, one per line."""
    lines = [str(question["hint"])] if question.get("hint") not in (None, "", "nan") else []
    lines.append(question_text(question))
    lines += [f"{letter}. {text}" for letter, text in options_of(question).items()]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Task:
    """The way a benchmark asks and counts."""

    score: Callable[[Sequence[Question], Sequence[str]], dict[str, float]]
    text: Callable[[Question], str] = question_text
    # The line after the question in LLaVA's evaluations.
    instruction: str = "Answer the question using a single word or phrase."

    def prompt(self, question: Question, instruction: str | None = None) -> str:
        """Phrase a question; `instruction` replaces the task's, "" leaves it out."""
        instruction = self.instruction if instruction is None else instruction
        return f"{self.text(question)}\n{instruction}" if instruction else self.text(question)


TASKS = {
    "vqa": Task(score_vqa),
    "exact": Task(score_exact),
    "pope": Task(score_pope),
    "mme": Task(score_mme),
    "choice": Task(
        score_choice,
        choice_text,
        "Answer with the option's letter from the given choices directly.",
    ),
}
